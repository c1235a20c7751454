"""The verb that writes the page."""
