"""The persistent side: keys, the user's store, the shipped library and portable bundles.

Nothing in this folder imports torch: a lookup costs a file access, and a second process can read the store in milliseconds.
"""
