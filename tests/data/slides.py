"""Slides of scanners, as small as they can be: written for OpenSlide to read."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def write_dicom(path: Path, pixels: np.ndarray, *, tile: int, jpeg: bool) -> None:
    """A DICOM whole-slide image of one level at 0.5 um/px; pixels: uint8 [h, w, 3]."""
    height, width = pixels.shape[:2]
    rows, cols = -(-height // tile), -(-width // tile)
    whole = np.zeros((rows * tile, cols * tile, 3), np.uint8)
    whole[:height, :width] = pixels
    frames = [
        np.ascontiguousarray(whole[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile])
        for r in range(rows)
        for c in range(cols)
    ]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _WHOLE_SLIDE
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    slide = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    slide.SOPClassUID, slide.SOPInstanceUID = _WHOLE_SLIDE, meta.MediaStorageSOPInstanceUID
    slide.SeriesInstanceUID, slide.StudyInstanceUID = generate_uid(), generate_uid()
    slide.Modality, slide.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    slide.DimensionOrganizationType = "TILED_FULL"
    slide.Rows = slide.Columns = tile
    slide.NumberOfFrames = len(frames)
    slide.TotalPixelMatrixRows, slide.TotalPixelMatrixColumns = height, width
    slide.TotalPixelMatrixFocalPlanes = slide.NumberOfOpticalPaths = 1
    slide.SamplesPerPixel, slide.PlanarConfiguration, slide.PixelRepresentation = 3, 0, 0
    slide.BitsAllocated = slide.BitsStored = 8
    slide.HighBit = 7
    slide.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [0.0005, 0.0005]  # mm
    shared.PixelMeasuresSequence = [measures]
    slide.SharedFunctionalGroupsSequence = [shared]
    if jpeg:
        slide.PixelData = encapsulate([bytes(imagecodecs.jpeg8_encode(f, 90)) for f in frames])
        slide["PixelData"].is_undefined_length = True
    else:
        slide.PixelData = b"".join(frame.tobytes() for frame in frames)
        slide["PixelData"].VR = "OB"
    slide.save_as(path, enforce_file_format=True)


def write_ndpi(path: Path, pixels: np.ndarray) -> None:
    """A Hamamatsu NDPI of one level, at 0.5 um/px, as one JPEG; sides of pixels: of 8 px."""
    integer, number, signed = 4, 11, 9  # types of TIFF's tags
    tifffile.imwrite(
        path,
        pixels,
        photometric="rgb",
        compression="jpeg",
        rowsperstrip=pixels.shape[0],
        subsampling=(1, 1),
        metadata=None,
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        extratags=[
            (65420, integer, 1, 1, True),  # format
            (65421, number, 1, 20.0, True),  # magnification
            *((tag, signed, 1, 0, True) for tag in (65422, 65423, 65424)),  # offsets, focal plane
        ],
    )


def write_leica(path: Path, levels: list[np.ndarray]) -> None:
    """An SCN of levels of any sizes, uint8 [h, w, 3] each, at 0.5 um/px, without loss."""
    height, width = levels[0].shape[:2]
    dims = "".join(
        f'<dimension sizeX="{one.shape[1]}" sizeY="{one.shape[0]}" r="{k}" ifd="{k}"/>'
        for k, one in enumerate(levels)
    )
    size = f'sizeX="{width * 500}" sizeY="{height * 500}"'  # nm
    around = f'sizeX="{width * 500 + 1000}" sizeY="{height * 500 + 1000}"'  # or it is a macro image
    about = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="urn:uuid:1" {around}><barcode>x</barcode>'
        '<image name="i" uuid="urn:uuid:2"><creationDate>2012-01-01T00:00:00Z</creationDate>'
        '<device model="Leica SCN400" version="1"/>'
        f'<pixels sizeX="{width}" sizeY="{height}">{dims}</pixels>'
        f'<view {size} offsetX="500" offsetY="500" spacingZ="0"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "</scanSettings></image></collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, pixels in enumerate(levels):
            file.write(
                pixels,
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                description=None if number else about,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )


def write_aperio(path: Path, levels: list[np.ndarray]) -> None:
    """An SVS of levels of any sizes, uint8 [h, w, 3] each, at 0.5 um/px, without loss."""
    height, width = levels[0].shape[:2]
    options = {"photometric": "rgb", "metadata": None, "compression": "zlib"}
    with tifffile.TiffWriter(path) as file:
        for number, pixels in enumerate(levels):
            file.write(
                pixels,
                tile=(64, 64),
                description=f"Aperio Image Library v1\n{width}x{height} (64x64) RAW|MPP = 0.5",
                subfiletype=int(number > 0),
                **options,
            )
            if number == 0:  # what it takes the second page for
                file.write(np.zeros((16, 16, 3), np.uint8), rowsperstrip=16, **options)
