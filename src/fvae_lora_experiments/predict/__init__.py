"""Predictions of a finished run for new images, texts, recordings and questions, row by row in constant memory."""
