class UserError(ValueError):
    """A mistake that the user can mend, told in words for the user.

    The command lines print its message alone and exit with code 2.
    """


class CorruptImageError(UserError):
    """An image file that cannot be read."""
