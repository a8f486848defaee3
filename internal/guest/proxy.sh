# Writes the proxy settings of its standard input, NAME=VALUE lines, to where logins and
# services of the guest find them, or removes what it wrote before if there are none. Runs
# as root, by any POSIX shell, busybox's included.
#
#   $1  all names that there may be
set -u
umask 022
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C
all=$1
new=$(cat)
fail() { echo "$*" >&2; exit 1; }

# Logins: PAM reads this file, and so does lab-agent. Every user of the guest gets the
# settings, so that everybody may read it.
f=/etc/environment
begin='# begin: written by lab' end='# end: written by lab'
[ ! -L $f ] || f=$(readlink -f $f) || fail "/etc/environment leads nowhere"
others='' mark=', as all of this file'
if [ -f "$f" ]; then
	others=$(sed "/^$begin/,/^$end/d" "$f")
	grep -q "^$begin$mark" "$f" || mark=''
fi
if [ -z "$new" ] && [ ! -f "$f" ]; then
	:
elif [ -z "$new$others" ] && [ -n "$mark" ]; then
	rm -f "$f"
else
	rm -f "$f.lab-new"
	if [ -f "$f" ]; then
		cp -p "$f" "$f.lab-new" || fail "$f cannot be copied"
	fi
	{
		[ -z "$others" ] || printf '%s\n' "$others"
		[ -z "$new" ] || printf '%s\n%s\n%s\n' "$begin$mark" "$new" "$end"
	} >"$f.lab-new" || fail "$f cannot be written"
	if [ -f "$f" ] && [ "$(cat "$f")" = "$(cat "$f.lab-new")" ]; then
		rm -f "$f.lab-new"
	else
		mv -f "$f.lab-new" "$f" || fail "$f cannot be replaced"
	fi
fi

# Services: systemd takes what this prints at every boot, and is told now.
[ -d /run/systemd/system ] || exit 0
dir=/etc/systemd/system-environment-generators
g=$dir/90-lab-proxy
if [ -n "$new" ]; then
	if [ ! -x $g ]; then
		mkdir -p $dir && cat >$g.lab-new <<-GENERATOR && chmod 755 $g.lab-new && mv -f $g.lab-new $g || fail "$g cannot be written"
			#!/bin/sh
			# Written by lab: services get the proxy settings that it wrote to /etc/environment.
			sed -n '/^$begin/,/^$end/{/^#/!p;}' /etc/environment
		GENERATOR
	fi
elif [ -e $g ]; then
	rm -f $g
	rmdir $dir 2>/dev/null
fi
set -f
IFS='
'
has='' hasnot=''
for line in $new; do
	export "$line"
	has="$has
${line%%=*}"
done
IFS=' '
for name in $all; do
	case "$has
" in *"
$name
"*) ;; *) hasnot="$hasnot $name" ;; esac
done
IFS=' 
'
# shellcheck disable=SC2086 # lists of names
{
	[ -z "$has" ] || systemctl import-environment $has || fail "systemd did not take the settings"
	[ -z "$hasnot" ] || systemctl unset-environment $hasnot
	# What a generator printed at boot goes only with the generator.
	for name in $hasnot; do
		if systemctl show-environment | grep -q "^$name="; then
			systemctl daemon-reload
			break
		fi
	done
}
exit 0
