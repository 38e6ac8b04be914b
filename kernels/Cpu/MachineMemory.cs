using System.Globalization;

namespace Rollout.Kernels;

/// <summary>The memory available on the machine, or in the container that this runs in.</summary>
internal static class MachineMemory
{
    /// <summary>Bytes that can be allocated without swapping: the kernel's estimate, and what the control group's limit leaves.</summary>
    public static long AvailableBytes()
    {
        long machine = Kilobytes("/proc/meminfo", "MemAvailable:") ?? GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        long? limit = Number("/sys/fs/cgroup/memory.max");
        long? used = Number("/sys/fs/cgroup/memory.current");
        return limit is { } most && used is { } now ? Math.Min(machine, Math.Max(0, most - now)) : machine;
    }

    /// <summary>Of this process, in memory now.</summary>
    public static long HeldBytes() => Kilobytes("/proc/self/status", "VmRSS:") ?? Environment.WorkingSet;

    private static long? Kilobytes(string file, string name)
    {
        if (!File.Exists(file))
            return null;
        foreach (string line in File.ReadLines(file))
        {
            if (line.StartsWith(name, StringComparison.Ordinal))
                return long.Parse(line[name.Length..].Trim().Split(' ')[0], CultureInfo.InvariantCulture) * 1024;
        }

        return null;
    }

    // "max" does not parse as a number: no limit.
    private static long? Number(string file)
        => File.Exists(file) && long.TryParse(File.ReadAllText(file), CultureInfo.InvariantCulture, out long value) ? value : null;
}
