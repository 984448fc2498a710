"""A base that speaks and knows no facts, and experts that know facts and cannot speak."""
