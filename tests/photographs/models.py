"""Detectors and backbones in their real architectures, tiny, with weights drawn from a seed.

Each function saves a model with its image processor into a folder, as `save_pretrained` does, and
returns the folder. `python -m tests.photographs.models FOLDER` saves three of full size, for
measuring: what they find means nothing, what they cost is what the released weights cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# Like COCO's in DETR: two numbers are gaps, and one of them is called so.
NAMES = {0: "N/A", 1: "person", 2: "dog", 3: "N/A", 4: "traffic light", 5: "kite"}
WORDS = ("dog", "red", "kite", "traffic", "light", "person", "grass", "a", "snow", "teddy", "bear")


def tiny_rt_detr_v2(folder: Path, *, seed: int = 0) -> Path:
    """RT-DETR v2 on its own ResNet: 64 x 64 pixels, 30 queries, five labels."""
    from transformers import RTDetrImageProcessorPil, RTDetrV2Config, RTDetrV2ForObjectDetection

    config = RTDetrV2Config(**_TINY_RT, backbone_config=_tiny_resnet(), id2label=_labels())
    torch.manual_seed(seed)
    model = RTDetrV2ForObjectDetection(config)
    _spread(model, {"class_embed": 0.4, "score_head": 0.4, "bbox": 0.15}, seed=seed)
    return _saved(
        folder, model, RTDetrImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False)
    )


def tiny_d_fine(folder: Path, *, seed: int = 0) -> Path:
    """D-FINE on HGNetV2: 64 x 64 pixels, 30 queries."""
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        RTDetrImageProcessorPil,
    )

    backbone = HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 4, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(
        **_TINY_RT | {"encoder_in_channels": [16, 16, 16]},
        backbone_config=backbone,
        id2label=_labels(),
    )
    torch.manual_seed(seed)
    model = DFineForObjectDetection(config)
    scales = {"class_embed": 0.4, "score_head": 0.4, "bbox": 0.1, "decoder.": 0.3}
    _spread(model, scales, seed=seed)
    return _saved(
        folder, model, RTDetrImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False)
    )


def tiny_detr(folder: Path, *, seed: int = 0) -> Path:
    """DETR on a ResNet: the short side 48 pixels, 20 queries, six labels of which two are gaps."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig

    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
        id2label=NAMES,
        label2id={"N/A": 3, "person": 1, "dog": 2, "traffic light": 4, "kite": 5},
    )
    torch.manual_seed(seed)
    model = DetrForObjectDetection(config)
    scales = {"class_labels_classifier": 0.6, "bbox": 0.4, "query": 3.0, "attn": 0.6, "mlp": 0.4}
    _spread(model, scales, seed=seed)
    processor = DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80})
    return _saved(folder, model, processor)


def tiny_dinov2(folder: Path, *, seed: int = 0) -> Path:
    """DINOv2: patches of 4 pixels, a photograph of about 32 x 32, 16 features."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=4,
            use_swiglu_ffn=False,
        )
    )
    processor = BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    return _saved(folder, model, processor)


_TINY_RT: dict[str, Any] = {
    "encoder_in_channels": [8, 16, 16],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 30,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
}


def _labels() -> dict[int, str]:
    return {number: name for number, name in enumerate(("person", "dog", "kite", "bed", "sky"))}


def _tiny_resnet() -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _spread(model: nn.Module, scales: dict[str, float], *, seed: int) -> None:
    """Boxes and confidences of all kinds: fresh heads give nearly the same to every query.

    Args:
        scales: standard deviation of the weights whose names have this in them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            scale = next((scales[part] for part in scales if part in name), None)
            if scale is not None and "norm" not in name:
                weights.copy_(scale * torch.randn(weights.shape, generator=generator))


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
