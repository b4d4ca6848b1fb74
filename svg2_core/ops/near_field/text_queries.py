"""The text queries of a call on a GPU, through torch's own attention: they attend to every key."""

import torch.nn.functional as F


def text_queries(q, k, v, out, layout, scale) -> None:
    """Into `out` `[B, H, N, D]`, before and after the video."""
    mask = None
    if layout.text_bias is not None and layout.video_len < k.shape[2]:
        bias = layout.text_bias.float()[:, None, None]
        mask = q.new_zeros(q.shape[0], 1, 1, k.shape[2])
        mask[..., : layout.video_start] = bias[..., : layout.video_start]
        mask[..., layout.video.stop :] = bias[..., layout.video_start :]
    for part in (slice(0, layout.video_queries.start), slice(layout.video_queries.stop, q.shape[2])):
        if part.start < part.stop:
            out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=mask, scale=scale)
