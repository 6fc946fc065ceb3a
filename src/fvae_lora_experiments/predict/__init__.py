"""What a finished run says of new images, texts, recordings and questions, row by row in constant memory."""
