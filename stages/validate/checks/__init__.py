"""What can be wrong with rows that have a form: each check takes the table and gives findings (`validate.CHECKS`)."""
