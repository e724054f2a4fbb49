"""Images as they come, each kind over the library that reads it, behind one small protocol."""

from axialtrain.data.readers.auto import AUTO, READERS, open_image, open_raster
from axialtrain.data.readers.reader import Info, Reader, Source, Tile, tiles_of

__all__ = [
    "AUTO",
    "READERS",
    "Info",
    "Reader",
    "Source",
    "Tile",
    "open_image",
    "open_raster",
    "tiles_of",
]
