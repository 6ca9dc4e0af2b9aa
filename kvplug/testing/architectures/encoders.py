"""Models whose decoder reads an encoder."""

from __future__ import annotations

from .base import HEAD, NO_TOKENS, SLIDING, Architecture

ENCODERS = {
    "t5": Architecture(
        "T5",
        {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "initializer_factor": 4.0, "decoder_start_token_id": 1, "eos_token_id": None,
         "pad_token_id": 0},
        "AutoModelForSeq2SeqLM", source="text",
    ),
    "bart": Architecture(
        "Bart",
        {"vocab_size": 97, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.2,
         "decoder_start_token_id": 1, "forced_eos_token_id": None, **NO_TOKENS},
        "AutoModelForSeq2SeqLM", source="text",
    ),
    "t5gemma, sliding": Architecture(
        "T5Gemma",
        {"encoder": {**HEAD, **SLIDING}, "decoder": {**HEAD, **SLIDING}, "vocab_size": 97,
         "decoder_start_token_id": 1, **NO_TOKENS},
        "AutoModelForSeq2SeqLM", source="text", attention="eager",
    ),
    "whisper": Architecture(
        "Whisper",
        {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
         "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
         "max_target_positions": 128, "init_std": 0.3, "decoder_start_token_id": 1,
         "suppress_tokens": None, "begin_suppress_tokens": None, **NO_TOKENS},
        "AutoModelForSpeechSeq2Seq", source="speech",
    ),
    "moonshine": Architecture(
        "Moonshine",
        {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64,
         "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2,
         "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
         "max_position_embeddings": 256, "initializer_range": 0.2, "decoder_start_token_id": 1,
         **NO_TOKENS},
        "AutoModelForSpeechSeq2Seq", source="wave",
    ),
}  # fmt: skip
