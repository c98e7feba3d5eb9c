"""The paper's Table 1 in small: class-conditional pictures judged by a classifier that is trained here."""
