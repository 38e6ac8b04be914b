using System.Globalization;

namespace Rollout.Kernels;

/// <summary>What the machine, or the container this runs in, has left.</summary>
internal static class MachineMemory
{
    /// <summary>Bytes that can be taken without swapping: the kernel's estimate, and what the control group's limit leaves.</summary>
    public static long AvailableBytes()
    {
        long machine = MemInfo("MemAvailable:") ?? GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        long? limit = Number("/sys/fs/cgroup/memory.max");
        long? used = Number("/sys/fs/cgroup/memory.current");
        return limit is { } most && used is { } now ? Math.Min(machine, Math.Max(0, most - now)) : machine;
    }

    private static long? MemInfo(string name)
    {
        if (!File.Exists("/proc/meminfo"))
            return null;
        foreach (string line in File.ReadLines("/proc/meminfo"))
        {
            if (line.StartsWith(name, StringComparison.Ordinal))
                return long.Parse(line[name.Length..].Trim().Split(' ')[0], CultureInfo.InvariantCulture) * 1024;
        }

        return null;
    }

    // "max" is no number: no limit.
    private static long? Number(string file)
        => File.Exists(file) && long.TryParse(File.ReadAllText(file), CultureInfo.InvariantCulture, out long value) ? value : null;
}
