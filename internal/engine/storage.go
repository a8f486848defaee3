// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// volumes is the store of the lab's volumes.
func (l *Lab) volumes() *volume.Store { return volume.Open(l.host.Dirs.Volumes(l.id), l.keeper) }

// keeper finds the files of volumes that are kept at a daemon of another host.
func (l *Lab) keeper(ctx context.Context, at volume.Place) (providers.VolumeFiles, error) {
	p, err := l.host.Provider(ledger.Opened{Provider: at.Provider, URI: at.URI})
	if err != nil {
		return nil, err
	}
	k, ok := p.(providers.VolumeKeeper)
	if !ok {
		return nil, fmt.Errorf("%w: that is not another host", providers.ErrIncapable)
	}
	return k.VolumeFiles(ctx, l.id)
}

// placeOf returns where the volumes of a provider's machines are kept.
func placeOf(p providers.Provider) volume.Place {
	if _, ok := p.(providers.VolumeKeeper); !ok {
		return volume.Place{}
	}
	at := volume.Place{Provider: p.Name()}
	if a, ok := p.(providers.Addressed); ok {
		at.URI = a.URI()
	}
	return at
}

// elsewhere says that a volume is kept where the machine cannot have it.
type elsewhere struct {
	volume string
	at, to volume.Place
}

// Error implements error.
func (e *elsewhere) Error() string {
	return fmt.Sprintf("volume %s is kept %s, and its machines are to run %s", e.volume, e.at, e.to)
}

// Hint is the next step.
func (e *elsewhere) Hint() string {
	return fmt.Sprintf("\"lab volume export %[1]s FILE\", \"lab volume rm %[1]s\" and \"lab volume import FILE %[1]s\" take it there, without its snapshots", e.volume)
}

// storable checks before anything is changed what can be known of volumes.
func (s *session) storable(want *lab.Lab) error {
	var errs []error
	for _, m := range want.Machines {
		refuse := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("machine %q: "+format, append([]any{m.Name}, args...)...))
		}
		if len(m.Volumes) > providers.MaxVolumes {
			refuse("%d volumes; a machine can have %d", len(m.Volumes), providers.MaxVolumes)
		}
		for _, err := range mountable(m) {
			refuse("%w", err)
		}
		if _, ok := s.provider.(providers.VolumeChanger); !ok && len(m.Volumes) > 0 {
			refuse("%w: %s has no volumes", providers.ErrIncapable, s.where())
		}
		for _, v := range m.Volumes {
			there, err := s.volumes().Get(v.Name)
			switch {
			case errors.Is(err, volume.ErrNotFound):
			case err != nil:
				errs = append(errs, err)
			case there.At != placeOf(s.provider):
				refuse("%w", &elsewhere{v.Name, there.At, placeOf(s.provider)})
			case v.Size < there.Size:
				refuse("volume %s has %s and cannot shrink to %s; ask for %s, or make a new volume under another name", v.Name, there.Size, v.Size, there.Size)
			case v.FS != there.FS:
				refuse("volume %s was made with fs: %s; write that, or make a new volume under another name", v.Name, there.FS)
			}
		}
	}
	errs = append(errs, s.confined(want)...)
	return errors.Join(errs...)
}

// where says what runs the lab's machines.
func (s *session) where() string {
	if a, ok := s.provider.(providers.Addressed); ok {
		return fmt.Sprintf("provider %s at %s", s.provider.Name(), a.URI())
	}
	return "provider " + s.provider.Name()
}

// attach gives a generation that is about to start its volumes: makes those that are
// missing, grows those that are to be larger, and takes a snapshot of what another
// generation left. Nobody else gets at the lab's volumes before free is called, which
// is for when the generation has started; free is never nil.
func (s *session) attach(ctx context.Context, g lab.Generation, m lab.Machine) (free func(), err error) {
	free = func() {}
	changer, ok := s.provider.(providers.VolumeChanger)
	if !ok && len(m.Volumes) > 0 {
		return free, fmt.Errorf("%w: %s has no volumes", providers.ErrIncapable, s.where())
	}
	if len(m.Volumes) == 0 {
		return free, nil
	}
	if live, err := s.provider.Inspect(ctx, g); err == nil && (live.State == providers.StateRunning || live.State == providers.StatePaused) {
		return free, nil // it has them
	}
	if free, err = s.volumes().Hold(ctx); err != nil {
		return func() {}, err
	}
	var attached []providers.Volume
	for _, v := range m.Volumes {
		a, err := s.attachOne(ctx, g, v)
		if err != nil {
			return free, fmt.Errorf("attaching volume %s: %w", v.Name, err)
		}
		attached = append(attached, a)
	}
	return free, changer.SetVolumes(ctx, g, attached)
}

func (s *session) attachOne(ctx context.Context, g lab.Generation, want lab.Volume) (providers.Volume, error) {
	store := s.volumes()
	out := providers.Volume{Name: serial(want.Name), ReadOnly: want.ReadOnly}
	note := func(format string, args ...any) {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageCreate, Text: fmt.Sprintf(format, args...)})
	}
	v, err := store.Get(want.Name)
	if errors.Is(err, volume.ErrNotFound) {
		note("making volume %s, %s", want.Name, want.Size)
		if v, err = store.Create(ctx, want, placeOf(s.provider)); err == nil {
			s.made = append(s.made, v.Name) // under Hold
			err = s.recordVolume(ledger.VolumeMade, ledger.VolumeAct{Volume: v.Name, Size: v.Size})
		}
	}
	if err != nil {
		return out, err
	}
	if at := placeOf(s.provider); v.At != at {
		return out, &elsewhere{v.Name, v.At, at}
	}
	if want.ReadOnly {
		// It reads what the volume holds now: a writer may come, or go on.
		now, err := s.cover(ctx, v.Name)
		if err != nil {
			return out, err
		}
		return s.chain(ctx, out, v, now.Layers)
	}
	users, err := s.users(ctx, v)
	if err != nil {
		return out, err
	}
	if err := s.unwritten(ctx, v, users, g); err != nil {
		return out, err
	}
	// What another generation left is kept as it is, before this one gets at it.
	rec, _ := s.machine(g.Machine).Of(g.Number)
	snap, err := store.Attach(ctx, v.Name, volume.Attachment{
		Machine: g.Machine, Generation: g.Number, Born: rec.Born.UTC().Format(time.RFC3339Nano),
	})
	if err != nil {
		return out, err
	}
	if snap != nil {
		note("volume %s: snapshot %d, %s", v.Name, snap.Number, snap.Why)
		if err := s.recordVolume(ledger.VolumeSnapshotted, ledger.VolumeAct{Volume: v.Name, Snapshot: snap.Number, Why: snap.Why}); err != nil {
			return out, err
		}
	}
	if want.Size > v.Size {
		note("growing volume %s to %s", v.Name, want.Size)
		if err := store.Grow(ctx, v.Name, want.Size); err != nil {
			return out, err
		}
		if err := s.recordVolume(ledger.VolumeGrown, ledger.VolumeAct{Volume: v.Name, Size: want.Size}); err != nil {
			return out, err
		}
	}
	if err := store.Thin(ctx, v.Name, opened(users)); err != nil {
		// The next start tries again.
		s.host.Log.Debug("removing old snapshots", "volume", v.Name, "err", err)
	}
	if v, err = store.Get(v.Name); err != nil {
		return out, err
	}
	return s.chain(ctx, out, v, v.Layers)
}

// chain fills in the files of a machine's disk that are those of a volume.
func (s *session) chain(ctx context.Context, disk providers.Volume, v volume.Volume, files []string) (providers.Volume, error) {
	paths, err := s.volumes().Paths(ctx, v, files)
	if err != nil {
		return disk, err
	}
	last := len(paths) - 1
	disk.Path, disk.Layers = paths[last], paths[:last]
	return disk, nil
}

// writes reports whether a machine of the lab has the volume for writing.
func (s *session) writes(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, machine := range s.state.Names() {
		for _, v := range s.state.Machines[machine].Create.Spec.Volumes {
			if v.Name == name && !v.ReadOnly {
				return true
			}
		}
	}
	return false
}

func (s *session) recordVolume(t ledger.Type, act ledger.VolumeAct) error {
	return s.record(t, lab.Generation{}, act)
}

// maxSerial is how long a virtio disk's serial number may be, in bytes.
const maxSerial = 20

// serial is by what the guest knows a volume's disk: its name or, of a long one, as
// much as there is room for and a checksum.
func serial(name string) string {
	if len(name) <= maxSerial {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return fmt.Sprintf("%s.%x", name[:maxSerial-9], sum[:4])
}

// maxEarly is how long the kernel parameters for volumes may be together, in bytes: a
// command line of x86 has 2048, of which boxes need some.
const maxEarly = 1280

// early returns the kernel parameters by which lab-agent mounts the machine's volumes
// before the guest's services start, on every boot. What they cannot say is mounted
// later, by mount.
func early(img Image, m lab.Machine) string {
	if !img.Agent || img.Kernel == "" {
		return ""
	}
	var words []string
	for _, v := range nested(m) {
		if v.FS == "none" {
			continue
		}
		words = append(words, agentapi.Volume{Serial: serial(v.Name), Path: v.Mount, ReadOnly: v.ReadOnly}.Param())
	}
	line := strings.Join(words, " ")
	if len(line) > maxEarly {
		return ""
	}
	return line
}

// nested returns the volumes in the order in which they are mounted: one that is within
// another comes after it.
func nested(m lab.Machine) []lab.Volume {
	volumes := slices.Clone(m.Volumes)
	slices.SortStableFunc(volumes, func(a, b lab.Volume) int { return strings.Compare(a.Mount, b.Mount) })
	return volumes
}

// mountTime bounds what mounting may take in a guest that answers.
const mountTime = 3 * time.Minute

// mount mounts the machine's volumes in the guest. What is mounted
// already stays.
func (s *session) mount(ctx context.Context, target guest.Target, g lab.Generation, m lab.Machine, c ledger.Create) error {
	script, owned, err := s.mountScript(m)
	if err != nil || script == "" {
		return err
	}
	if err := s.runAsRoot(ctx, target, g, c, "mounting its volumes", script); err != nil {
		return err
	}
	if len(owned) == 0 {
		return nil
	}
	free, err := s.volumes().Hold(ctx)
	if err != nil {
		return err
	}
	defer free()
	for _, v := range owned {
		if err := s.volumes().Prepared(ctx, v.Name, v.Owner, v.Mode); err != nil {
			return err
		}
	}
	return nil
}

// runAsRoot runs a script in the guest. What says what that is for.
func (s *session) runAsRoot(ctx context.Context, target guest.Target, g lab.Generation, c ledger.Create, what, script string) error {
	cmd := guest.Command{Args: []string{"sh", "-c", script}}
	client, sudo, err := s.loginAsRoot(ctx, target, g, c, what)
	if err != nil {
		return err
	}
	defer client.Close()
	if sudo {
		cmd.Args = append([]string{"sudo", "-n"}, cmd.Args...)
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: what})
	ctx, cancel := context.WithTimeout(ctx, mountTime)
	defer cancel()
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := client.Run(ctx, cmd); err != nil {
		if why := strings.TrimSpace(said.String()); why != "" {
			return fmt.Errorf("%s: %s (%w)", what, why, err)
		}
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// loginAsRoot logs in to the guest as root, or as a user who becomes root with sudo. What
// says what that is for.
func (s *session) loginAsRoot(ctx context.Context, target guest.Target, g lab.Generation, c ledger.Create, what string) (client *guest.Client, sudo bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if c.Agent {
		target.User = "root" // the agent lets the lab in as root on every box
	} else if err := s.awaitLogin(ctx, target, g, what); err != nil {
		return nil, false, err
	}
	client, err = guest.Connect(ctx, target)
	return client, target.User != "root", err
}

// awaitLogin waits until the ssh server of a guest without an agent lets the lab in.
func (s *session) awaitLogin(ctx context.Context, target guest.Target, g lab.Generation, what string) error {
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: "waiting for a login, for " + what})
	login := lab.Check{Kind: lab.CheckSSH, Timeout: bootTimeout, Interval: time.Second}
	return guest.WaitReady(ctx, target, []lab.Check{login}, nil, nil)
}

// mountScript is what the guest's root runs, and the volumes whose root folder gets
// an owner and a mode by that: those that are new, or that another owner was asked
// for. Empty if there is nothing to mount.
func (s *session) mountScript(m lab.Machine) (string, []lab.Volume, error) {
	var (
		b     strings.Builder
		owned []lab.Volume
	)
	call := func(words ...string) { b.WriteString(guest.Quote(words) + "\n") }
	for _, v := range nested(m) {
		if v.FS == "none" {
			continue
		}
		there, err := s.volumes().Get(v.Name)
		if err != nil {
			return "", nil, err
		}
		switch {
		case v.ReadOnly:
			call("volume", v.Name, serial(v.Name), v.Mount, "ro")
		case there.Owner == v.Owner && there.Mode == v.Mode || v.Owner == "" && v.Mode == "":
			call("volume", v.Name, serial(v.Name), v.Mount, "rw")
		default:
			owned = append(owned, v)
			call("volume", v.Name, serial(v.Name), v.Mount, "rw", v.Owner, v.Mode)
		}
	}
	if b.Len() == 0 {
		return "", nil, nil
	}
	return mountFunctions + b.String(), owned, nil
}

// mountFunctions are in what any sh and busybox have. A device is found by the serial
// number that its disk has. A volume that was mounted early stays as it is; otherwise a
// new one, which holds lost+found and nothing else, is given what the image has at its
// place, as lab-agent does it early. Where no agent will do that at the next boot, the
// guest's own fstab does.
const mountFunctions = `fail() { echo "$*" >&2; exit 1; }
mounted() { while read -r dev _; do [ "$dev" = "$1" ] && return 0; done </proc/mounts; return 1; }
new() {
	[ -d "$1/lost+found" ] || return 1
	[ -e "$1/.lab-filling" ] && return 0
	[ "$(ls -A "$1")" = lost+found ]
}
fill() {
	find "$1" -mindepth 1 -maxdepth 1 ! -name lost+found ! -name .lab-filling -exec rm -rf {} + &&
		: >"$1/.lab-filling" && cp -a "$2/." "$1/" && sync &&
		rm -rf "$1/.lab-filling" "$1/lost+found" && sync
}
volume() {
	disk=
	for f in /sys/block/*/serial; do
		if [ -r "$f" ] && [ "$(cat "$f")" = "$2" ]; then f=${f%/serial}; disk=/dev/${f##*/}; fi
	done
	[ -n "$disk" ] || fail "volume $1: the guest's kernel shows no disk with the serial number $2"
	if ! mounted "$disk"; then
		case " $(cat /proc/cmdline)" in
		*" lab.volume=$2,"*) fail "volume $1 could not be mounted at $3 before the services started; the console says why (lab logs)";;
		esac
		mkdir -p "$3" || fail "volume $1: $3 cannot be made"
		if [ "$4" = rw ]; then
			stage=$(mktemp -d) && mount -t ext4 "$disk" "$stage" || fail "volume $1: $disk cannot be mounted"
			filled=true
			if new "$stage"; then fill "$stage" "$3" || filled=false; fi
			umount "$stage" && rmdir "$stage" || fail "volume $1: $disk cannot be unmounted from $stage"
			[ $filled = true ] || fail "volume $1: what the image has in $3 cannot be copied to it"
			mount -t ext4 "$disk" "$3" || fail "volume $1: $disk cannot be mounted at $3"
		else
			mount -t ext4 -o ro "$disk" "$3" 2>/dev/null || mount -t ext4 -o ro,noload "$disk" "$3" ||
				fail "volume $1: $disk cannot be mounted at $3"
		fi
		id=/dev/disk/by-id/virtio-$2
		case $3 in *[[:space:]]*) id= ;; esac
		if [ -e "$id" ] && [ -f /etc/fstab ] && ! grep -qF "$id " /etc/fstab; then
			echo "$id $3 ext4 $4,nofail 0 2 # lab" >>/etc/fstab
		fi
	fi
	if [ -n "${5:-}" ]; then
		chown "$5" "$3" || fail "volume $1: $3 cannot belong to $5; does the image have that user?"
	fi
	if [ -n "${6:-}" ]; then
		chmod "$6" "$3" || fail "volume $1: $3 cannot have the mode $6"
	fi
}
`
