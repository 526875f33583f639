"""Region features to region embeddings.

Axes:  image, region   of a batch, padded    feature   width of the detector's features
       dim             width of the joint embedding space
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Projects a region's features and adds where in the image it is.

        v0_r = FC(x_r) + MLP(x_r) + U_g geo_r,   geo = (x1/W, y1/H, x2/W, y2/H, area/(W H))

    Features are scaled to unit length times sqrt(feature) first, so that one learning rate serves
    detectors whose features differ in size by orders of magnitude.

    Source: residual head of VSE-inf (arXiv:2011.04305), without its batch norm: statistics of a
    batch would make the result depend on the number of workers.
    """

    def __init__(self, *, feature_dim: int, dim: int, geometry: bool) -> None:
        super().__init__()
        self.normalize = nn.RMSNorm(feature_dim, elementwise_affine=False)
        self.linear = nn.Linear(feature_dim, dim)
        self.residual = nn.Sequential(
            nn.Linear(feature_dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim)
        )
        self.geometry = nn.Linear(5, dim, bias=False) if geometry else None

    def forward(
        self,
        features: Float[Tensor, "image region feature"],
        geometry: Float[Tensor, "image region 5"] | None,
    ) -> Float[Tensor, "image region dim"]:
        """v0, not normalized."""
        features = self.normalize(features.to(self.linear.weight.dtype))
        regions = self.linear(features) + self.residual(features)
        if self.geometry is not None:
            assert geometry is not None, "the model was built for data with boxes"
            regions = regions + self.geometry(geometry.to(regions.dtype))
        return regions
