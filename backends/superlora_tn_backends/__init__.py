"""Backends of superlora_tn: each module turns a contraction plan into a callable (see `superlora_tn.contraction.backend`)."""
