"""The key-value cache of a model that samples: what rows may share, and memory for tokens to come."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer


def keeps_keys(cache) -> bool:
    """Whether what a model returned as its cache is keys and values alone, which rows with the same opening
    can share; not so with recurrent state, linear attention, or where there is no cache."""
    keys = lambda layer: isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer)
    return type(cache) is DynamicCache and all(map(keys, cache.layers))


def make_room(cache: DynamicCache, room: int) -> None:
    """Give each layer of a cache memory for `room` tokens more; one with a sliding window stays as it is."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _Roomy(layer, room)


class _Roomy(DynamicLayer):
    """A cache layer with memory for tokens to come: Hugging Face's copies all earlier keys and values at
    every token."""

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        self.is_initialized, self.dtype, self.device, self.used = (
            True,
            layer.dtype,
            layer.device,
            layer.keys.shape[-2],
        )
        self.held = [
            torch.cat([t, t.new_empty(*t.shape[:2], room, t.shape[3])], 2) for t in (layer.keys, layer.values)
        ]
        self._show()

    def _show(self):
        self.keys, self.values = (t[:, :, : self.used] for t in self.held)
        return self.keys, self.values

    def update(self, key_states, value_states, *args, **kwargs):
        """As DynamicLayer.update."""
        start, self.used = self.used, self.used + key_states.shape[-2]
        for held, new in zip(self.held, (key_states, value_states)):
            held[:, :, start : self.used] = new
        return self._show()

    def batch_select_indices(self, indices):
        """As DynamicLayer.batch_select_indices."""
        self.held = [t[indices] for t in self.held]
        self._show()
