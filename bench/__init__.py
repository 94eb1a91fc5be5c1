"""Each figure of Atoll beside raw QEMU and libvirt, in one run: `./dev bench [--peers]`."""
