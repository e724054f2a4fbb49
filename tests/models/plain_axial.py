"""Axial-ResNet and Axial-DeepLab once more, of torch's own functions on whole [B, C, H, W] images.

Takes the parameters and buffers of a model of ours by name, and gives what it should compute. The
attention follows the layers of the first public code: permuted, all logits at once, tables spread
by an index over queries and keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain:
    """state: parameters (which get gradients) and buffers, by the names of the model of ours.

    training: batch norms take the batch's statistics, and move copies of the running ones, which
    are in `buffers` afterwards.
    """

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.parameters = {
            name: value.detach().clone().requires_grad_()
            for name, value in model.named_parameters()
        }
        self.buffers = {name: value.clone() for name, value in model.named_buffers()}
        self.training = training

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Batch norm of [B, C, ...]."""
        return F.batch_norm(
            x,
            self.buffers[f"{name}.running_mean"],
            self.buffers[f"{name}.running_var"],
            self.parameters[f"{name}.weight"],
            self.parameters[f"{name}.bias"],
            self.training,
        )

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        if weight.ndim == 2:
            weight = weight[:, :, None, None]
        padding = dilation * (weight.shape[-1] // 2)
        groups = x.shape[1] // weight.shape[1]
        bias = self.parameters.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    # --- Axial-ResNet -----------------------------------------------------------------------------

    def attention(self, x: Tensor, name: str, heads: int) -> Tensor:
        """Along the last dim of [B, C, X, L]."""
        images, channels, lines, length = x.shape
        x = x.permute(0, 2, 1, 3).reshape(images * lines, channels, length)
        qkv = F.conv1d(x, self.parameters[f"{name}.qkv.weight"][..., None])
        qkv = self.norm(qkv, f"{name}.bn_qkv")
        half = channels // heads // 2
        q, k, v = qkv.view(len(x), heads, 4 * half, length).split((half, half, 2 * half), 2)
        table = self.parameters[f"{name}.relative"]
        reach = table.shape[1] // 2
        at = torch.arange(length)
        back = (at[:, None] - at).clamp(-reach, reach) + reach  # query - key
        ahead = (at - at[:, None]).clamp(-reach, reach) + reach  # key - query
        of_q, of_k, of_v = table.split((half, half, 2 * half))
        qk = torch.einsum("bgci,bgcj->bgij", q, k)
        qr = torch.einsum("bgci,cij->bgij", q, of_q[:, back])
        kr = torch.einsum("bgcj,cij->bgij", k, of_k[:, ahead])
        stacked = self.norm(torch.cat((qk, qr, kr), 1), f"{name}.bn_similarity")
        weights = stacked.view(len(x), 3, heads, length, length).sum(1).softmax(-1)
        content = torch.einsum("bgij,bgcj->bgci", weights, v)
        position = torch.einsum("bgij,cij->bgci", weights, of_v[:, back])
        both = torch.stack((content, position), 3).reshape(len(x), 2 * channels, length)
        out = self.norm(both, f"{name}.bn_output").view(len(x), channels, 2, length).sum(2)
        return out.view(images, lines, channels, length).permute(0, 2, 1, 3)

    def block(self, x: Tensor, name: str, heads: int, stride: int) -> Tensor:
        out = self.norm(self.conv(x, f"{name}.conv_down"), f"{name}.bn1").relu()
        out = self.attention(out.transpose(2, 3), f"{name}.height", heads).transpose(2, 3)
        out = self.attention(out, f"{name}.width", heads)
        if stride > 1:
            out = F.avg_pool2d(out, stride)
        out = self.norm(self.conv(out.relu(), f"{name}.conv_up"), f"{name}.bn2")
        if f"{name}.downsample.conv.weight" in self.parameters:
            x = self.conv(x, f"{name}.downsample.conv", stride)
            x = self.norm(x, f"{name}.downsample.bn")
        return (out + x).relu()

    def resnet(self, pixels: Tensor, config, name: str = "") -> list[Tensor]:
        """pixels: [B, H, W, bands] -> the map behind each stage, [B, C, H', W']."""
        x = self.conv(pixels.permute(0, 3, 1, 2), f"{name}conv1", 2)
        x = F.max_pool2d(self.norm(x, f"{name}bn1").relu(), 3, 2, 1)
        maps = []
        for stage, blocks in enumerate(config.layers, 1):
            strides = {1: 1, 4: config.output_stride // 16}.get(stage, 2)
            for index in range(blocks):
                stride = strides if index == 0 else 1
                x = self.block(x, f"{name}layer{stage}.{index}", config.heads, stride)
            maps.append(x)
        return maps

    # --- Panoptic-DeepLab's decoders --------------------------------------------------------------

    def conv_norm(self, x: Tensor, name: str, dilation: int = 1) -> Tensor:
        return self.norm(self.conv(x, f"{name}.conv", dilation=dilation), f"{name}.bn").relu()

    def separable(self, x: Tensor, name: str) -> Tensor:
        return self.conv_norm(self.conv_norm(x, f"{name}.depthwise"), f"{name}.pointwise")

    def decoder(self, maps: list[Tensor], name: str, dilations: list[int]) -> Tensor:
        x = maps[3]
        if dilations:
            pooled = self.conv(x.mean((2, 3), keepdim=True), f"{name}.aspp.pooled").relu()
            branches = [
                self.conv_norm(x, f"{name}.aspp.branches.{index}", dilation)
                for index, dilation in enumerate((1, *dilations))
            ]
            x = torch.cat((*branches, pooled.expand_as(branches[0])), 1)
        x = self.conv_norm(x, f"{name}.aspp.project")
        for step, low in enumerate((maps[1], maps[0])):
            x = F.interpolate(x, size=low.shape[2:], mode="bilinear")
            x = torch.cat((x, self.conv_norm(low, f"{name}.project.{step}")), 1)
            x = self.separable(x, f"{name}.fuse.{step}")
        return x

    def predictor(self, x: Tensor, name: str) -> Tensor:
        return self.conv(self.separable(x, f"{name}.conv"), f"{name}.out")

    def panoptic(self, pixels: Tensor, config) -> Tensor:
        """-> [B, H, W, classes + 3]."""
        maps = self.resnet(pixels, config.trunk, "backbone.trunk.")
        semantic = self.decoder(maps, "semantic", config.aspp)
        instance = self.decoder(maps, "instance", config.aspp)
        said = [
            self.predictor(semantic, "head"),
            self.predictor(instance, "centre"),
            self.predictor(instance, "offset") * 4,
        ]
        return F.interpolate(torch.cat(said, 1), scale_factor=4, mode="bilinear").permute(
            0, 2, 3, 1
        )
