"""What `check` found, as data, text, JUnit XML, Markdown and a page of HTML."""
