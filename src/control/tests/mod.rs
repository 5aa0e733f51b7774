//! Decisions, against a crew that records what it is asked and answers when the test says so.

mod decisions;
mod random;
mod recorder;
