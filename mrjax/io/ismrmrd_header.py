"""The ISMRMRD XML header that fastMRI's readers expect in a k-space file."""

_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <experimentalConditions><H1resonanceFrequency_Hz>12770000</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace>{space}</encodedSpace>
    <reconSpace>{space}</reconSpace>
    <encodingLimits>
      <kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></kspace_encoding_step_1>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>
"""


def header(size: tuple[int, int], pixel_mm: float = 1.0, thickness_mm: float = 5.0) -> str:
    """Write the XML header of a Cartesian 2-D acquisition at 0.3 T in which every phase-encode column was sampled.

    `size` is (height, width) of k-space and image; height is the readout (`x`), width the phase encoding (`y`).
    """
    height, width = size
    matrix = f"<matrixSize><x>{height}</x><y>{width}</y><z>1</z></matrixSize>"
    sides = f"<x>{height * pixel_mm:g}</x><y>{width * pixel_mm:g}</y><z>{thickness_mm:g}</z>"
    space = f"{matrix}<fieldOfView_mm>{sides}</fieldOfView_mm>"
    return _HEADER.format(space=space, last=width - 1, centre=width // 2)
