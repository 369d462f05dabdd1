"""Between text and token ids: the chat template, encoding and decoding of one model's tokenizer.

The only place that calls a tokenizer, so prompts are the same ids in training, sampling, evaluation
and serving. Nothing is ever truncated: a prompt that does not fit is an error with its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from envs.errors import UserError


class PromptTooLongError(UserError):
    """A prompt has more tokens than the model was configured for."""

    def __init__(self, num_tokens: int, max_prompt_length: int) -> None:
        super().__init__(
            f"A prompt has {num_tokens} tokens, but model.max_prompt_length is "
            f"{max_prompt_length}: raise it (and generation.max_model_len with it)."
        )
        self.num_tokens = num_tokens
        self.max_prompt_length = max_prompt_length

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return (PromptTooLongError, (self.num_tokens, self.max_prompt_length))


class Renderer:
    """Chat messages to prompt ids, answers to ids, ids to text.

    Example:
        renderer = Renderer("run/tiny", max_prompt_length=512)
        renderer.prompt_ids([{"role": "user", "content": "green A 25"}])   # (2, 41, 317, 3)
        renderer.answer_ids('{"phase": "C"}')                              # (.., .., .., 4)
    """

    def __init__(self, model_path: str, *, max_prompt_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"Expected a model with a tokenizer at {str(model_path)!r}, but none can be loaded "
                f"({str(error).splitlines()[0]}): name the folder of a Hugging Face model."
            ) from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {str(model_path)!r} has no chat template: use an instruction-"
                "tuned model or add a chat_template.jinja to its folder."
            )
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {str(model_path)!r} names no eos_token, so answers would never "
                "end: set it in tokenizer_config.json."
            )
        self.max_prompt_length = max_prompt_length

    @property
    def eos_id(self) -> int:
        """Ends every answer; stopping at it is what `finish_reason == "stop"` means."""
        return self._tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Fills rows of a batch; the end token where the tokenizer has no own."""
        pad = self._tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The chat up to where the answer begins; raises PromptTooLongError, never truncates."""
        # A template that does not know `enable_thinking` ignores it.
        ids = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=False,
        )
        if len(ids) > self.max_prompt_length:
            raise PromptTooLongError(len(ids), self.max_prompt_length)
        return tuple(ids)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """An answer as the model should give it, the end token included."""
        return (*self._tokenizer.encode(text, add_special_tokens=False), self.eos_id)

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of answers, without special tokens."""
        return self._tokenizer.batch_decode(sequences, skip_special_tokens=True)
