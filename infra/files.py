from infra.disk import make_folder, writing
from infra.lock import only_writer
from infra.rows import atomic_write
