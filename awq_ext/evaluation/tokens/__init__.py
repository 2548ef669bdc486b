"""What is known of single tokens once a text is scored."""
