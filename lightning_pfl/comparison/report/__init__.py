"""From records to one page that a browser shows and a printer prints, and to Markdown tables. Start at `page`."""
