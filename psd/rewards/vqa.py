"""BLIP-VQA as a reward: how sure a model that answers questions is that the image shows the prompt.

The question and the score are those of VQAScore (arXiv 2404.01291), without its "Please answer yes or no."
T2I-CompBench (arXiv 2307.06350) asks the same model about each noun phrase of the prompt instead.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BertTokenizer, BlipForQuestionAnswering

from psd.rewards.base import check_groups
from psd.rewards.clip_preference import load_transformers
from psd.rewards.preprocessing import Preprocessing
from psd.rewards.prompt_tokens import PromptTokens
from psd.rewards.reward_folder import check_reward_folder

QUESTION = 'Does this figure show "{prompt}"?'
ANSWER = "yes"


class BlipVqaReward:
    """The probability that the answer to ``Does this figure show "PROMPT"?`` starts with "yes", among all words."""

    differentiable = True
    group_size = 1

    def __init__(self, model: BlipForQuestionAnswering, tokenizer: BertTokenizer, preprocessing: Preprocessing) -> None:
        self._model = model.requires_grad_(False).eval()
        self._tokens = PromptTokens(tokenizer, model.config.text_config.max_position_embeddings)
        self._preprocess = preprocessing
        head = model.text_decoder.cls  # shares weights with the embeddings, which stay as they are
        self._head = head if model.dtype == torch.float32 else copy.deepcopy(head).float()
        self._yes = tokenizer.convert_tokens_to_ids(ANSWER)
        if self._yes == tokenizer.unk_token_id:
            raise ValueError(f'the tokenizer does not know "{ANSWER}"; use the one of the checkpoint')

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> BlipVqaReward:
        """Loads safetensors from a local folder; never from the network.

        Raises:
            ValueError: the folder, a file in it or its weights are missing or damaged, or it holds another model.
        """
        root = Path(folder)
        check_reward_folder(root, "BlipForQuestionAnswering")
        preprocessing = Preprocessing.from_json(root / "preprocessor_config.json")
        model = load_transformers(BlipForQuestionAnswering, root, dtype)
        return cls(model.to(device), BertTokenizer.from_pretrained(root, local_files_only=True), preprocessing)

    def __call__(self, rgb: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_groups(self, len(rgb), len(prompts))
        patches = self._model.vision_model(self._preprocess(rgb).to(self._model.dtype)).last_hidden_state
        if len(set(prompts)) == 1:  # the usual case, without indices that a GPU would have to wait for
            return self._probability(prompts[0], patches)
        rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
        scores = torch.cat([self._probability(prompt, patches[chosen]) for prompt, chosen in rows.items()])
        order = [i for chosen in rows.values() for i in chosen]
        return scores[[order.index(i) for i in range(len(order))]]

    def _probability(self, prompt: str, patches: Float[Tensor, "b patches dim"]) -> Float[Tensor, " b"]:
        """One question at a time: the decoder of transformers would attend to the padding of a shorter one."""
        ids, _ = self._tokens([QUESTION.format(prompt=prompt)], patches.device)
        ids = ids.expand(len(patches), -1)
        question = self._model.text_encoder(ids, encoder_hidden_states=patches).last_hidden_state
        start = ids.new_full((len(ids), 1), self._model.decoder_start_token_id)
        decoder = self._model.text_decoder.bert
        answer = decoder(start, encoder_hidden_states=question, is_decoder=True, use_cache=False).last_hidden_state
        probabilities: Tensor = self._head(answer[:, 0].float()).softmax(-1)[:, self._yes]
        return probabilities
