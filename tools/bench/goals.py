def tables(figures):
    return ""
