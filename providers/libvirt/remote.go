// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
)

// Remote runs machines as domains of a daemon of another host, of which nothing but the
// connection is needed. What a machine is made of lies in a storage pool there; its
// console, the agent's channel and its network cable are streams of libvirt's. The
// generation's directory on this host holds locks and what this host saw of it.
type Remote struct {
	p *Provider

	mu    sync.Mutex // guards files
	files *pool
}

var (
	_ providers.Provider      = (*Remote)(nil)
	_ providers.Cabled        = (*Remote)(nil)
	_ providers.MemoryCounter = (*Remote)(nil)
	_ providers.RoomCounter   = (*Remote)(nil)
	_ providers.AgentDialer   = (*Remote)(nil)
	_ providers.Freezer       = (*Remote)(nil)
	_ providers.DiskReader    = (*Remote)(nil)
	_ providers.Addressed     = (*Remote)(nil)
	_ providers.Pruner        = (*Remote)(nil)
	_ providers.SpecChecker   = (*Remote)(nil)
)

func newRemote(p *Provider) *Remote {
	p.client = clientOf(p.cfg.Dirs.Data) + ":"
	return &Remote{p: p}
}

// clientOf tells the data homes of all hosts and users apart that may meet at a daemon. It
// stays the same if everything in the data home is lost. machine-id(5) asks for its
// value not to be handed out as it is.
func clientOf(data string) string {
	machine, err := os.ReadFile("/etc/machine-id")
	if id := strings.TrimSpace(string(machine)); err != nil || id == "" {
		machine = nil
	}
	if machine == nil {
		name, _ := os.Hostname() // without one the paths have to differ
		machine = []byte(name)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s client\x00%s\x00%d\x00%s", namespace, machine, os.Getuid(), data))
	return fmt.Sprintf("%x", sum[:6])
}

// Name returns "libvirt".
func (r *Remote) Name() string { return r.p.Name() }

// URI names the daemon.
func (r *Remote) URI() string { return r.p.URI() }

// At returns the provider of another daemon.
func (r *Remote) At(uri string) (providers.Provider, error) { return r.p.At(uri) }

// Daemons looks at the directories of the lab's generations.
func (r *Remote) Daemons(id lab.ID) ([]string, error) { return r.p.Daemons(id) }

// Close ends the connection to the daemon.
func (r *Remote) Close() { r.p.Close() }

// Reach connects with the daemon and finds the pool.
func (r *Remote) Reach(ctx context.Context) error {
	if err := r.p.Reach(ctx); err != nil {
		return err
	}
	_, err := r.pool(ctx)
	return err
}

// pool finds the storage pool.
func (r *Remote) pool(ctx context.Context) (*pool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.files != nil {
		return r.files, nil
	}
	found, err := r.p.link.openPool(ctx, r.poolName())
	if err == nil {
		r.files = found
	}
	return found, err
}

func (r *Remote) poolName() string { return cmp.Or(r.p.addr.pool, DefaultPool) }

// stored is what a domain's metadata says of the volumes that its machine is born from.
type stored struct {
	Disk   string   `json:"disk"`
	Layers []string `json:"layers,omitempty"`
	Kernel string   `json:"kernel,omitempty"`
	Initrd string   `json:"initrd,omitempty"`
}

// names lists the volumes.
func (s stored) names() []string {
	return slices.DeleteFunc(append([]string{s.Disk, s.Kernel, s.Initrd}, s.Layers...), func(name string) bool { return name == "" })
}

// stored decodes which volumes the machine is born from.
func (o owner) stored() (s stored, err error) {
	if err := json.Unmarshal([]byte(o.Stored), &s); err != nil {
		return s, fmt.Errorf("reading a domain's metadata: %w", err)
	}
	return s, nil
}

// prefix begins the names of a generation's own volumes.
func (r *Remote) prefix(g lab.Generation) string {
	u := uuidOf(r.p.home(g))
	return fmt.Sprintf("%s.%x.", domainName(g), u[:4])
}

// The rest of the names.
const (
	volumeSeed = "seed.img"
	volumeLog  = "console.log"
)

// cable is the socket of the network cable. QEMU makes it, and must be allowed to.
func (r *Remote) cable(g lab.Generation, files *pool) string {
	u := uuidOf(r.p.home(g))
	dir := "/var/lib/libvirt/qemu" // libvirt gives that to QEMU's user
	if r.p.addr.session {
		dir = files.dir
	}
	return fmt.Sprintf("%s/lab-%x.nic", dir, u[:8])
}

// Create sends what is missing of the image to the pool, makes the machine's own volumes
// there and, last, defines its domain.
func (r *Remote) Create(ctx context.Context, spec providers.Spec) error {
	if err := r.create(ctx, spec); err != nil {
		return fmt.Errorf("creating machine %q: %w", spec.Generation, err)
	}
	return nil
}

func (r *Remote) create(ctx context.Context, spec providers.Spec) error {
	g := spec.Generation
	if err := r.p.enter(ctx, g); err != nil {
		return err
	}
	if err := r.CheckSpec(ctx, spec); err != nil {
		return err
	}
	dir := r.p.dir(g)
	defined := func() (bool, error) {
		_, ok, err := r.p.find(ctx, g)
		return ok && exists(dir), err
	}
	return local.Make(ctx, dir, spec, defined, func(def local.Definition) error { return r.finish(ctx, dir, def) })
}

// CheckSpec says what Create would refuse.
func (r *Remote) CheckSpec(_ context.Context, spec providers.Spec) error {
	if err := local.CheckSpec(spec, local.CheckAbsolute); err != nil {
		return err
	}
	if spec.Network != lab.NetworkSwitch {
		if err := r.p.mayNetwork(); err != nil {
			return err
		}
	}
	if len(spec.Mounts) > 0 {
		return fmt.Errorf("%w: %s is on another host, which cannot see this one's folders", providers.ErrIncapable, r.URI())
	}
	return nil
}

// HostMemory returns the memory of the daemon's host. libvirt tells neither its swap nor
// what its kernel promises.
func (r *Remote) HostMemory(ctx context.Context) (providers.HostMemory, error) {
	return answer(ctx, r.p.link, func(l *golibvirt.Libvirt) (providers.HostMemory, error) {
		_, memory, _, _, _, _, _, _, err := l.NodeGetInfo()
		return providers.HostMemory{RAM: lab.Bytes(memory) * lab.KiB, Unbounded: true}, err
	})
}

// HostRoom returns what libvirt says is free in the storage pool, which must be there and
// active.
func (r *Remote) HostRoom(ctx context.Context) (providers.HostRoom, error) {
	files, err := r.p.link.openPool(ctx, r.poolName()) // anew: it may have been stopped
	if err != nil {
		return providers.HostRoom{}, err
	}
	free, err := files.free(ctx)
	return providers.HostRoom{At: files.dir + " at " + r.p.addr.uri, Free: free}, err
}

// finish makes of a generation that has its directory one that has a domain.
func (r *Remote) finish(ctx context.Context, dir string, def local.Definition) error {
	files, err := r.pool(ctx)
	if err != nil {
		return err
	}
	if err := r.p.claim(dir); err != nil {
		return err
	}
	g := def.Generation()
	// Until the domain names them, nothing else keeps images from being pruned.
	held, err := r.lockImages(ctx)
	if err != nil {
		return err
	}
	defer held.Close()
	from, err := r.images(ctx, files, def.Image)
	if err != nil {
		return err
	}
	if err := r.overlays(g, files).add(ctx, 0, def.Disk); err != nil {
		return err
	}
	if def.Seed {
		f, err := os.Open(filepath.Join(dir, local.FileSeed))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := files.put(ctx, r.prefix(g)+volumeSeed, f, rawVolume); err != nil {
			return err
		}
	}
	if err := files.make(ctx, rawVolume(r.prefix(g)+volumeLog, 0)); err != nil {
		return err
	}
	// What is here of them was made for the journey. Later, an overlay here is one that
	// was fetched.
	for _, file := range []string{local.FileOverlay, local.FileSeed} {
		if err := local.IgnoreGone(os.Remove(filepath.Join(dir, file))); err != nil {
			return err
		}
	}
	_, err = r.define(ctx, files, domainName(g), def, from)
	return err
}

// define gives the domain called name the definition that its next start will have.
func (r *Remote) define(ctx context.Context, files *pool, name string, def local.Definition, from stored) (golibvirt.Domain, error) {
	g := def.Generation()
	if err := r.p.claim(r.p.dir(g)); err != nil { // also of what an older lab made
		return golibvirt.Domain{}, err
	}
	var run local.Run
	if _, err := local.ReadJSON(filepath.Join(r.p.dir(g), local.FileRun), &run); err != nil {
		return golibvirt.Domain{}, err
	}
	overlays := r.overlays(g, files)
	own, err := overlays.list(ctx)
	if err != nil {
		return golibvirt.Domain{}, err
	}
	at := func(name string) string {
		if name == "" {
			return ""
		}
		return files.path(name)
	}
	d := Domain{
		Name: name, UUID: uuidOf(r.p.home(g)), Directory: r.p.home(g), Def: def, KVM: run.Accel == accel.KVM,
		Stored: &from, NIC: r.cable(g, files),
		Files: Files{
			Disk: at(from.Disk), Kernel: at(from.Kernel), Initrd: at(from.Initrd),
			Seed: at(r.prefix(g) + volumeSeed), ConsoleLog: at(r.prefix(g) + volumeLog),
		},
	}
	for _, name := range from.Layers {
		d.Files.Layers = append(d.Files.Layers, at(name))
	}
	for _, n := range own {
		d.Files.Overlays = append(d.Files.Overlays, overlays.path(n))
	}
	return r.p.defineDomain(ctx, d)
}

// Destroy ends the domain, undefines it, removes its volumes and, last, the directory:
// interrupted anywhere, it leaves what List shows and the next Destroy removes.
func (r *Remote) Destroy(ctx context.Context, g lab.Generation) error {
	return r.p.destroy(ctx, g, r.removeVolumes)
}

// removeVolumes removes the generation's own volumes.
func (r *Remote) removeVolumes(ctx context.Context, g lab.Generation) error {
	files, err := r.pool(ctx)
	var gone *errPool
	if errors.As(err, &gone) {
		return nil // and all that was in it
	}
	if err != nil {
		return err
	}
	// libvirt numbers the logs that have grown long, without the pool's knowing.
	if err := files.refresh(ctx); err != nil {
		r.p.log.Debug("looking for a machine's volumes", "error", err)
	}
	there, err := files.list(ctx)
	if err != nil {
		return err
	}
	for name := range there {
		if strings.HasPrefix(name, r.prefix(g)) {
			if err := files.remove(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}
