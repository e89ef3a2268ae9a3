"""What each notebook of Part I measures and draws, one module a notebook; `common` is what they share."""
