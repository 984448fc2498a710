"""`collm demo`: a real model learns when to use a calculator."""
