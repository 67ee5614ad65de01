#!/usr/bin/env bash
# Unpacks what kvtide links and tests with, built for arm64, into build/arm64-sysroot: the -dev packages of packages.txt with all that
# they depend on, from the Debian repositories that this machine uses. This machine's own packages and architectures stay as they are.
# Also installs the cross compiler and QEMU where they are missing. Does nothing when all is there. Debian 12, x86-64.
#   deploy/arm64/sysroot.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
deploy/install_packages.sh deploy/arm64/packages.txt
mapfile -t wanted < <(grep -E '^[a-z0-9+.-]+-dev$' deploy/packages.txt | grep -v '^python')
root="$PWD/build/arm64-sysroot"
[ -f "$root/complete" ] && [ "$(cat "$root/complete")" = "${wanted[*]}" ] && exit 0
rm -rf "$root"

# A package database of its own, in which nothing is installed yet.
apt="$root/var/lib/apt" dpkg="$root/var/lib/dpkg"
mkdir -p "$apt/lists/partial" "$root/var/cache/apt/archives/partial" "$dpkg/info" "$root/usr/lib" "$root/usr/bin"
touch "$dpkg/status"
echo 1 > "$dpkg/info/format"  # names of packages with their architecture
apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' > "$apt/sources.list"
[ -s "$apt/sources.list" ] || { echo "sysroot.sh: apt of this machine knows no Debian repository (apt-get update?); Debian 12 is needed" >&2; exit 1; }
cat > "$apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "root";
Dir::State "$apt";
Dir::State::status "$dpkg/status";
Dir::Cache "$root/var/cache/apt";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
END
export APT_CONFIG="$apt/apt.conf" DEBIAN_FRONTEND=noninteractive
echo "libraries for arm64: ${wanted[*]}"
apt-get update -qq
apt-get install -y -qq --no-install-recommends --download-only libc6-dev "${wanted[@]}" > "$apt/log" || { cat "$apt/log" >&2; exit 1; }

# Unpacked, and entered as dpkg would: dpkg-shlibdeps then knows which package brings a library.
ln -s usr/lib "$root/lib"
for package in "$root"/var/cache/apt/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
  name="$(dpkg-deb --show --showformat='${Package}' "$package")"
  case "$(dpkg-deb -f "$package" Multi-Arch)" in same) name+=":arm64" ;; esac
  # Below this folder, and where the link /lib leads.
  dpkg-deb -c "$package" | awk -v root="$root" '{sub(/^\.\/lib\//, "./usr/lib/", $6); sub(/^\./, "", $6); sub(/\/$/, "", $6); print root $6}' > "$dpkg/info/$name.list"
  for part in shlibs symbols; do dpkg-deb -I "$package" "$part" > "$dpkg/info/$name.$part" 2>/dev/null || rm "$dpkg/info/$name.$part"; done
  { dpkg-deb -f "$package" | sed '1a Status: install ok installed'; echo; } >> "$dpkg/status"
done
rm -rf "$root/var/cache/apt"
# Links to absolute paths lead out of this folder.
find "$root" -type l -lname '/*' -printf '%p\t%l\n' | while IFS=$'\t' read -r link target; do ln -sfnr "$root$target" "$link"; done
# Packages for CMake name the generators of code beside them: those run here.
for program in protoc /usr/bin/grpc_*_plugin; do ln -sf "/usr/bin/${program##*/}" "$root/usr/bin/${program##*/}"; done
echo "${wanted[*]}" > "$root/complete"
