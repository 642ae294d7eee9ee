//! Stores and sinks with one deliberate flaw each, which the suites must reject.
