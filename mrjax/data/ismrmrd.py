"""The ISMRMRD XML header that fastMRI's readers expect in a k-space file."""

_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <experimentalConditions><H1resonanceFrequency_Hz>12770000</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace>{encoded}</encodedSpace>
    <reconSpace>{recon}</reconSpace>
    <encodingLimits>
      <kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></kspace_encoding_step_1>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
</ismrmrdHeader>
"""
_SPACE = (
    "<matrixSize><x>{0}</x><y>{1}</y><z>1</z></matrixSize>"
    "<fieldOfView_mm><x>{2:g}</x><y>{3:g}</y><z>{4:g}</z></fieldOfView_mm>"
)


def header(
    encoded: tuple[int, int],
    recon: tuple[int, int],
    *,
    pixel_mm: tuple[float, float] = (1.0, 1.0),
    thickness_mm: float = 5.0,
) -> str:
    """Write the XML header of a Cartesian 2-D acquisition at 0.3 T in which every phase-encode column was sampled.

    `encoded` and `recon` are (height, width) of k-space and image; height is the readout (`x`), width the phase
    encoding (`y`). `pixel_mm` is the size of an image pixel along (height, width).
    """
    spaces = [
        _SPACE.format(*size, *(n * mm for n, mm in zip(size, pixel_mm, strict=True)), thickness_mm)
        for size in (encoded, recon)
    ]
    last, centre = encoded[1] - 1, encoded[1] // 2
    return _HEADER.format(encoded=spaces[0], recon=spaces[1], last=last, centre=centre)
