//! The scenarios of the sink suite, by theme.
