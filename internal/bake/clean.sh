# Removes from the machine what only this one machine should have, so that what is
# left can become an image. Runs as root, by any POSIX shell, busybox's included.
#
#   $1  keep: further steps follow, and what they need comes back by "restore"
#       last: nothing follows
#       restore: puts back what keep put aside
#   $2  the lab's public ssh key, without its comment
#   $3  the machine's host name
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
umask 077

# Aside means in memory: a file on the disk would be part of the image.
aside=
for dir in /run /dev/shm; do
	if grep -q "^[^ ]* $dir tmpfs " /proc/mounts; then
		aside=$dir/lab-bake
		break
	fi
done

if [ "$1" = restore ]; then
	[ -f "$aside/keep.tar" ] || exit 0
	tar -xpf "$aside/keep.tar" -C / && rm -rf "$aside"
	exit
fi

# Homes are taken from the accounts, so that none is missed.
homes=$(cut -d: -f6 /etc/passwd | sort -u)

if [ "$1" = keep ]; then
	[ -n "$aside" ] || { echo "no memory file system to put files aside in" >&2; exit 1; }
	mkdir -p "$aside"
	cd /
	list=
	for f in etc/machine-id etc/hostname etc/hosts etc/resolv.conf etc/ssh/ssh_host_* etc/dropbear/dropbear_*_host_key \
		etc/netplan/50-cloud-init.yaml etc/network/interfaces.d/50-cloud-init* etc/systemd/network/10-cloud-init-* \
		etc/NetworkManager/system-connections/cloud-init-*; do
		{ [ -e "$f" ] || [ -L "$f" ]; } && list="$list $f"
	done
	for h in $homes; do
		[ -f "$h/.ssh/authorized_keys" ] && list="$list ${h#/}/.ssh/authorized_keys"
	done
	if [ -n "$list" ]; then
		# shellcheck disable=SC2086 # names of the system, without spaces
		tar -cpf "$aside/keep.tar" $list || exit
	fi
fi

# Who it is.
[ -e /etc/machine-id ] && : >/etc/machine-id
[ -L /var/lib/dbus/machine-id ] || rm -f /var/lib/dbus/machine-id
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /etc/ssh/ssh_host_*_key-cert.pub /etc/dropbear/dropbear_*_host_key
rm -f /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /var/lib/urandom/random-seed /var/lib/seedrng/seed.*
rm -rf /var/lib/lab-agent/*
if [ "$(cat /etc/hostname 2>/dev/null)" = "$3" ]; then
	echo localhost >/etc/hostname
	chmod 644 /etc/hostname
fi
if [ -f /etc/hosts ]; then
	others=$(grep -v -e '# lab-agent$' -e "[[:space:]]$3\([[:space:].]\|\$\)" /etc/hosts)
	printf '%s\n' "$others" >/etc/hosts
fi
[ -f /etc/resolv.conf ] && grep -q '^# written by lab-agent' /etc/resolv.conf && rm -f /etc/resolv.conf
for h in $homes; do
	f=$h/.ssh/authorized_keys
	if [ -f "$f" ] && grep -qF "$2" "$f"; then
		others=$(grep -vF "$2" "$f")
		if [ -n "$others" ]; then printf '%s\n' "$others" >"$f"; else rm -f "$f"; fi
	fi
	rm -f "$h"/.*_history "$h/.lesshst" "$h/.viminfo" "$h/.wget-hsts"
done

# What it got from the network and from cloud-init.
rm -f /var/lib/dhcp/*.lease* /var/lib/dhclient/*.lease* /var/lib/dhcpcd/* /var/lib/NetworkManager/*lease* \
	/var/lib/NetworkManager/secret_key /var/lib/NetworkManager/seen-bssids /var/lib/misc/udhcpd.leases
rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init* /etc/systemd/network/10-cloud-init-* \
	/etc/NetworkManager/system-connections/cloud-init-* /etc/udev/rules.d/70-persistent-net.rules
if [ -d /var/lib/cloud ]; then
	for f in /var/lib/cloud/*; do
		[ "$f" = /var/lib/cloud/seed ] || rm -rf "$f"
	done
fi

# What it wrote down. Files stay, with their owners: services expect them.
if [ -d /var/log ]; then
	find /var/log -xdev -type f \( -name '*.gz' -o -name '*.xz' -o -name '*.[0-9]' -o -name '*.old' -o -name '*.journal*' \
		-o -name 'cloud-init*.log' \) -exec rm -f {} +
	find /var/log -xdev -type f -size +0 | while IFS= read -r f; do
		: >"$f"
	done
fi
rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*
for dir in /tmp /var/tmp; do
	[ -d "$dir" ] && [ ! -L "$dir" ] && find "$dir" -xdev -mindepth 1 -maxdepth 1 -exec rm -rf {} +
done
sync
