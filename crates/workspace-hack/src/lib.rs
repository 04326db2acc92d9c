//! Empty: its manifest makes every cargo command of the workspace resolve the same features.
