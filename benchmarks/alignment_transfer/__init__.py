"""Does P transfer between real language models, and under which alignment? See README.md."""
