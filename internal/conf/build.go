package conf

import "runtime/debug"

// Set by the linker: -X kuma/internal/conf.version=1.2.3 and so on.
var (
	version   = "0.1.0-dev"
	gitCommit = ""
	buildDate = ""
)

// BuildInfo says which build of the product this is.
type BuildInfo struct {
	// Product is always "Kuma": clients compare it with their own.
	Product string
	// Version is the release, such as "1.2.3".
	Version string
	// GitCommit and BuildDate are empty where nobody knows them.
	GitCommit, BuildDate string
}

// Build returns what the linker was told, and for the rest what the Go tool
// recorded about the source.
func Build() BuildInfo {
	b := BuildInfo{Product: "Kuma", Version: version, GitCommit: gitCommit, BuildDate: buildDate}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && b.GitCommit == "":
			b.GitCommit = s.Value
		case s.Key == "vcs.time" && b.BuildDate == "":
			b.BuildDate = s.Value
		}
	}
	return b
}
