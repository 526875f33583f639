"""Models for others: what is known of where one comes from, its card, and its way to the Hub."""
