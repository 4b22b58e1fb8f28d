"""Running a program that may be hostile: namespaces, seccomp, limits, and the processes on both sides of the wall."""
