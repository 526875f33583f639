"""One study: its plan, its trials and their records, and what came out."""
