"""Multi-token prediction: one more layer a depth that looks one token further ahead.

Report section 2.2, equations 21 to 25. Embedding and head are the main model's.
"""

import torch
from torch import Tensor, nn

from dsv3.model.block import Block
from dsv3.model.config import ModelConfig
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.router import RouterStats
from dsv3.model.segments import Segments


class MTPModule(nn.Module):
    """Depth k: joins the hidden state at position i with the embedding of token i + k.

    `projection` takes [norm(embedding), norm(hidden)], the order of the released weights (HF:
    eh_proj, enorm, hnorm); the report's eq. 21 writes the two the other way round.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.projection = Linear(2 * config.dim, config.dim)
        self.block = Block(config, dense=False)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotary: Tensor, segments: Segments | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """This depth's hidden state from the previous one and `embedded`, both [batch, sequence, dim].

        What goes from depth to depth, and to the head, has passed the depth's last norm (HF:
        shared_head.norm), as the first depth's input has passed the main model's.
        """
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        x, stats = self.block(self.projection(joined), rotary, segments)
        return self.norm(x), stats


def shift_tokens(tokens: Tensor, depth: int) -> Tensor:
    """Tokens [batch, sequence] moved `depth` places ahead.

    The last `depth` places wrap around; their targets lie beyond the row, so the loss ignores them.
    """
    return tokens.roll(-depth, dims=-1)
