"""Detectors and backbones in their real architectures, tiny, with weights drawn from a seed.

Each function saves a model with its image processor into a folder, as `save_pretrained` does, and
returns the folder. `python -m tests.photographs.models FOLDER` saves three of full size, for
measuring: what they find means nothing, what they cost is what the released weights cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.photographs.odd import Odd, odd_photographs

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
    scales = {"class_embed": 0.4, "score_head": 0.4, "bbox": 0.1, "decoder.": 0.3, "conv": 0.4}
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


def tiny_owlv2(folder: Path, *, seed: int = 0) -> Path:
    """OWLv2: 32 x 32 pixels in patches of 8, so 16 queries."""
    from transformers import (
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessorPil,
        Owlv2TextConfig,
        Owlv2VisionConfig,
    )

    tokenizer = _tiny_clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Owlv2Config(
        text_config=Owlv2TextConfig(
            **sizes,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        vision_config=Owlv2VisionConfig(
            **sizes, num_attention_heads=2, image_size=32, patch_size=8
        ).to_dict(),
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = Owlv2ForObjectDetection(config)
    _spread(model, {"class_head": 0.5, "box_head": 0.5, "embedding": 1.0}, seed=seed)
    tokenizer.save_pretrained(folder)
    return _saved(folder, model, Owlv2ImageProcessorPil(size={"height": 32, "width": 32}))


def tiny_grounding_dino(folder: Path, *, seed: int = 0) -> Path:
    """Grounding DINO on a Swin: the short side 64 pixels, 12 queries, texts of 24 tokens."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        SwinConfig,
    )

    # The model knows the numbers of its separators by heart: [CLS], [SEP], full stop, "?".
    pieces = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    pieces |= {1012: ".", 1029: "?"} | dict(enumerate(WORDS, start=1030))
    size = 1030 + len(WORDS)
    vocabulary = {pieces.get(number, f"[unused{number}]"): number for number in range(size)}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=12,
        max_text_len=24,
        disable_custom_kernels=True,
    )
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config)
    _spread(model, {"bbox": 0.3, "decoder.": 0.4, "query_position": 1.0}, seed=seed)
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    return _saved(folder, model, processor)


def tiny_siglip(folder: Path, *, seed: int = 0) -> Path:
    """SigLIP (and SigLIP 2 of a fixed size, which is the same) with both its halves."""
    from transformers import (
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
        SiglipTextConfig,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = SiglipConfig(
        text_config=SiglipTextConfig(
            **sizes, num_attention_heads=2, vocab_size=32, bos_token_id=1, eos_token_id=2
        ).to_dict(),
        vision_config=SiglipVisionConfig(
            **sizes, num_attention_heads=2, image_size=32, patch_size=8
        ).to_dict(),
    )
    torch.manual_seed(seed)
    return _saved(
        folder, SiglipModel(config), SiglipImageProcessorPil(size={"height": 32, "width": 32})
    )


def tiny_siglip2(folder: Path, *, seed: int = 0) -> Path:
    """SigLIP 2 of any shape (NaFlex): at most 16 patches of 8 pixels."""
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessorPil,
        Siglip2Model,
        Siglip2TextConfig,
        Siglip2VisionConfig,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Siglip2Config(
        text_config=Siglip2TextConfig(**sizes, num_attention_heads=2, vocab_size=32).to_dict(),
        vision_config=Siglip2VisionConfig(
            **sizes, num_attention_heads=2, patch_size=8, num_patches=16
        ).to_dict(),
    )
    torch.manual_seed(seed)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return _saved(folder, Siglip2Model(config), processor)


def tiny_vit(folder: Path, *, seed: int = 0) -> Path:
    """ViT as a classifier: patches of 8 pixels, 32 x 32; its head is not asked for."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(seed)
    return _saved(
        folder,
        ViTForImageClassification(config),
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )


def tiny_convnext(folder: Path, *, seed: int = 0) -> Path:
    """ConvNeXt: a cell of its map is 32 pixels wide."""
    from transformers import ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

    torch.manual_seed(seed)
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]))
    return _saved(folder, model, ConvNextImageProcessorPil(size={"shortest_edge": 96}))


def rt_detr_v2(folder: Path, *, depth: Literal[18, 50] = 50, seed: int = 0) -> Path:
    """RT-DETR v2 in the shape of its releases with ResNet-18 or -50; the weights are drawn."""
    from transformers import (
        RTDetrImageProcessorPil,
        RTDetrResNetConfig,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
    )

    stages = ["stage2", "stage3", "stage4"]
    if depth == 18:
        backbone = RTDetrResNetConfig(
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=stages,
        )
        sizes: dict[str, Any] = {
            "encoder_in_channels": [128, 256, 512],
            "decoder_layers": 3,
            "hidden_expansion": 0.5,
        }
    else:
        backbone, sizes = RTDetrResNetConfig(out_features=stages), {}
    names = {number: f"thing {number}" for number in range(80)}
    torch.manual_seed(seed)
    model = RTDetrV2ForObjectDetection(
        RTDetrV2Config(backbone_config=backbone, id2label=names, **sizes)
    )
    # Otherwise every confidence is that of the prior, and nothing is ever found.
    _spread(model, {"class_embed": 0.2}, seed=seed)
    return _saved(folder, model, RTDetrImageProcessorPil())


def dinov2_small(folder: Path, *, seed: int = 0) -> Path:
    """DINOv2 in the shape of its smallest release; the weights are drawn."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    )
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
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
    return dict(enumerate(("person", "dog", "kite", "bed", "sky")))


def _tiny_clip_tokenizer() -> Any:
    """One that knows letters: a byte, or a byte that ends a word, a piece."""
    from transformers import CLIPTokenizer

    letters = [chr(byte) for byte in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!")


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


def main() -> None:
    """Saves the models of full size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rt_detr_v2(folder / "rt-detr-v2-r18", depth=18)
    rt_detr_v2(folder / "rt-detr-v2-r50", depth=50)
    dinov2_small(folder / "dinov2-small")


__all__ = ["Odd", "odd_photographs"]

if __name__ == "__main__":
    main()
