import numpy as np
import pytest
from conftest import to_kspace

from mrjax.mri.encoding import Encoding, to_centre, to_first


@pytest.mark.parametrize("rows", [1, 7])
def test_encoding_and_its_adjoint_equal_centred_transforms_in_numpy(rows: int) -> None:
    """For odd and even sides; E^H E and E^H y are what solvers use."""
    rng = np.random.default_rng(0)
    maps, other, image = (rng.normal(size=(*n, 7, 10, 2)) @ [1, 1j] for n in ((3,), (3,), ()))
    mask = rng.random((rows, 10)) < 0.5
    kspace = to_kspace(other)
    encoding, measured = Encoding.of(kspace.astype(np.complex64), mask, maps.astype(np.complex64))

    def adjoint(kspace: np.ndarray) -> np.ndarray:
        images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"), (-2, -1))
        return (maps.conj() * images).sum(0)

    np.testing.assert_allclose(to_centre(encoding.adjoint(measured)), adjoint(mask * kspace), atol=1e-5)
    encoded = encoding.apply(to_first(image.astype(np.complex64)))
    expected = adjoint(mask * to_kspace(maps * image))
    np.testing.assert_allclose(to_centre(encoding.adjoint(encoded)), expected, atol=1e-5)
    assert np.linalg.norm(encoded) == pytest.approx(np.linalg.norm(mask * to_kspace(maps * image)), rel=1e-5)
