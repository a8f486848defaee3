// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
)

// verdict is what is remembered of a daemon's host: whether KVM was seen to run guest code
// there.
type verdict struct {
	Host   string    `json:"host"`   // what the verdict is about
	Kernel bool      `json:"kernel"` // a real kernel was run, not firmware alone
	Usable bool      `json:"usable"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

// settles reports whether the verdict answers the question about that host. What firmware
// cannot do a kernel cannot, and a kernel's word counts for firmware too.
func (v verdict) settles(host string, kernel bool, now time.Time) bool {
	age := now.Sub(v.At)
	return v.Host == host && age >= 0 && age < verdictTime && (v.Kernel || !kernel || !v.Usable)
}

// verdictTime is how long a verdict is believed: that host's kernel may change, which is
// not seen from here.
const verdictTime = 24 * time.Hour

// accel decides how the daemon's host runs machines: by KVM only if it was seen to run
// guest code there.
func (r *Remote) accel(ctx context.Context, files *pool, kernel string) (accel.Accel, error) {
	switch wanted := r.p.cfg.Accel; wanted {
	case accel.TCG, accel.KVM:
		return accel.Accel{Name: wanted, Reason: "as configured"}, nil
	case accel.Auto, "":
	default:
		return accel.Accel{}, fmt.Errorf("acceleration %q: must be auto, kvm or tcg", wanted)
	}
	host, err := r.host(ctx)
	if err != nil {
		return accel.Accel{}, err
	}
	decide := func(v verdict) accel.Accel {
		if v.Usable {
			return accel.Accel{Name: accel.KVM, Reason: v.Reason}
		}
		return accel.Accel{
			Name: accel.TCG, Reason: "KVM does not work at " + r.URI() + ": " + v.Reason,
			Cure: "use a host with working (nested) virtualization, or lab doctor --provider libvirt there",
		}
	}
	sum := sha256.Sum256([]byte(r.URI()))
	file := filepath.Join(r.p.cfg.Dirs.Cache, fmt.Sprintf("accel-%x.json", sum[:8]))
	if err := os.MkdirAll(r.p.cfg.Dirs.Cache, 0o700); err != nil {
		return accel.Accel{}, err
	}
	// Machines start in parallel; one probe is enough for all.
	held, err := local.Lock(ctx, strings.TrimSuffix(file, ".json")+".lock")
	if err != nil {
		return accel.Accel{}, err
	}
	defer held.Close()
	var v verdict
	if ok, err := local.ReadJSON(file, &v); err == nil && ok && v.settles(host, kernel != "", time.Now()) {
		return decide(v), nil
	}
	v = verdict{Host: host, Kernel: kernel != ""}
	err = r.p.offers(ctx, "kvm")
	switch _, said := code(err); {
	case said:
		v.Reason = "libvirt there offers emulation only"
	case err != nil:
		return accel.Accel{}, err
	default:
		if v.Usable, v.Reason, err = r.probe(ctx, files, "kvm", kernel); err != nil {
			return accel.Accel{}, fmt.Errorf("probing for KVM at %s: %w", r.URI(), err)
		}
	}
	v.At = time.Now().UTC()
	r.p.log.Debug("probed KVM", "uri", r.URI(), "usable", v.Usable, "reason", v.Reason)
	if err := local.WriteJSON(file, v); err != nil {
		return accel.Accel{}, err
	}
	return decide(v), nil
}

// host identifies what the verdict depends on, as far as libvirt tells.
func (r *Remote) host(ctx context.Context) (string, error) {
	return answer(ctx, r.p.link, func(l *golibvirt.Libvirt) (string, error) {
		text, err := l.ConnectGetCapabilities()
		if err != nil {
			return "", err
		}
		var doc struct {
			UUID string `xml:"host>uuid"`
			CPU  string `xml:"host>cpu>model"`
		}
		if err := xml.Unmarshal([]byte(text), &doc); err != nil {
			return "", fmt.Errorf("reading what the host is: %w", err)
		}
		qemu, err := l.ConnectGetVersion()
		return fmt.Sprintf("%s %s %s", doc.UUID, doc.CPU, version(qemu)), err
	})
}

// probe runs a kernel of the pool, or a boot sector if that is empty, in a domain of that
// type, and reports whether it did its work in time. The domain ends with this process.
func (r *Remote) probe(ctx context.Context, files *pool, kind, kernel string) (usable bool, reason string, err error) {
	name := r.helper("probe")
	log, disk := name+".log", name+".img"
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		err = errors.Join(err, files.remove(cleanup, log), files.remove(cleanup, disk))
	}()
	if err := files.make(ctx, rawVolume(log, 0)); err != nil {
		return false, "", err
	}
	doc := helperXML(kind, name)
	doc.Memory.Size = 256 << 10
	doc.Devices.Serial = []chardev{{Type: "pty", Log: &logXML{files.path(log), "on"}, Target: target{Port: "0"}}}
	load := accel.Kernel
	if kernel != "" {
		doc.OS.Kernel, doc.OS.Cmdline = files.path(kernel), load.Append
	} else {
		load = accel.Firmware
		if err := r.putProbe(ctx, files, disk); err != nil {
			return false, "", err
		}
		doc.Devices.Disks = []diskXML{{
			Type: "file", Device: "disk", Driver: driver{Name: "qemu", Type: "raw"}, Source: source{File: files.path(disk)},
			Backing: end(), Target: target{Dev: mainDisk, Bus: "virtio"}, ReadOnly: &struct{}{}, Boot: &boot{1}, Address: at(slotDisk),
		}}
	}
	text, err := encode(doc)
	if err != nil {
		return false, "", err
	}
	err = r.p.link.apart(ctx, func(l *golibvirt.Libvirt) error {
		err := toldWhy(ctx, func() error {
			_, err := l.DomainCreateXML(text, golibvirt.DomainStartAutodestroy)
			return err
		})
		if err != nil {
			return err
		}
		usable, reason, err = r.watch(ctx, files, log, load)
		return err
	})
	if _, said := code(err); said {
		return false, "libvirt says: " + err.Error(), nil
	}
	return usable, reason, err
}

// helper names a domain that is nobody's machine.
func (r *Remote) helper(what string) string {
	return "lab-" + what + "-" + r.suffix() + "-" + strings.ToLower(rand.Text()[:8])
}

// helperXML is a domain with what no domain can do without.
func helperXML(kind, name string) domainXML {
	return domainXML{
		Type: kind, QEMU: qemuNamespace, Name: name, Memory: memory{"KiB", "off", 16 << 10}, CPUs: 1,
		OS: osXML{Type: osType{"x86_64", "q35", "hvm"}}, CPU: cpuXML{Mode: "maximum", Check: "none"}, Clock: clock{"utc"},
		OnPowerOff: "destroy", OnReboot: "destroy", OnCrash: "destroy",
		Devices: devices{
			Controllers: []controller{{Type: "usb", Model: "none"}, {Type: "pci", Model: "pcie-root"}},
			Balloon:     model{"none"},
		},
	}
}

// watch looks at the console's log until a payload has shown itself or its time is over.
func (r *Remote) watch(ctx context.Context, files *pool, log string, load accel.Payload) (bool, string, error) {
	limited, cancel := context.WithTimeout(ctx, load.Limit)
	defer cancel()
	for {
		text, err := files.tail(limited, log, 0)
		for _, word := range load.Words {
			if bytes.Contains(text, []byte(word)) {
				return true, load.Says, nil
			}
		}
		if err == nil {
			err = pause(limited, probeTick)
		}
		switch {
		case ctx.Err() != nil:
			return false, "", ctx.Err()
		case limited.Err() != nil:
			return false, fmt.Sprintf("guest code did not get through in %s", load.Limit), nil
		case err != nil:
			return false, "", err
		}
	}
}

// probeTick is how often the console of a probe is looked at.
const probeTick = 50 * time.Millisecond

func (r *Remote) putProbe(ctx context.Context, files *pool, name string) error {
	f, err := os.CreateTemp("", "lab-probe-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(accel.Sector()); err != nil {
		return err
	}
	return files.put(ctx, name, f, rawVolume)
}

// checkAccel tells what was decided, as a finding about the daemon's host.
func (r *Remote) checkAccel(ctx context.Context, files *pool) providers.Finding {
	f := providers.Finding{Topic: "acceleration"}
	a, err := r.accel(ctx, files, "")
	switch {
	case err != nil:
		f.Level, f.Detail = providers.LevelError, err.Error()
	case a.Name == accel.TCG:
		f.Level, f.Cure = providers.LevelWarning, a.Cure
		f.Detail = "tcg, pure emulation, some ten times slower: " + a.Reason
		if r.p.cfg.Accel == accel.TCG {
			f.Cure = "set " + accel.Variable + "=auto to have KVM tried"
		}
	default:
		f.Level, f.Detail = providers.LevelOK, a.Name+": "+a.Reason
	}
	return f
}
