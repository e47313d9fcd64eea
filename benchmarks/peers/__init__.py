"""The same steps in other libraries, each as that library's users would write it for speed."""
