using System.Globalization;

namespace Rollout.Server.Tests;

/// <summary>Resources of a process, from /proc.</summary>
internal sealed record Footprint(double ResidentMegabytes, IReadOnlyList<string> Threads, IReadOnlyList<string> Files)
{
    /// <summary>Without the threads that .NET starts and ends by itself, and the assemblies that it loads on demand.</summary>
    public static Footprint Of(int process)
    {
        string proc = $"/proc/{process.ToString(CultureInfo.InvariantCulture)}";
        string resident = File.ReadLines($"{proc}/status").Single(line => line.StartsWith("VmRSS:", StringComparison.Ordinal));
        List<string> threads = [];
        foreach (string task in Directory.GetDirectories($"{proc}/task"))
        {
            if (Read(() => File.ReadAllText($"{task}/comm").Trim()) is { } name && !name.StartsWith(".NET ", StringComparison.Ordinal))
                threads.Add(name);
        }

        List<string> files = [];
        foreach (string descriptor in Directory.GetFiles($"{proc}/fd"))
        {
            if (Read(() => File.ResolveLinkTarget(descriptor, returnFinalTarget: false)?.FullName) is { } target
                && Path.GetExtension(target) is not (".dll" or ".pdb"))
            {
                files.Add(Kind(target));
            }
        }

        double megabytes = double.Parse(resident.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) / 1024;
        return new Footprint(megabytes, [.. threads.Order(StringComparer.Ordinal)], [.. files.Order(StringComparer.Ordinal)]);
    }

    /// <summary>Without the parts that differ each time: the number of a socket, the name of the segment for updates.</summary>
    private static string Kind(string target)
    {
        if (!target.Contains(':', StringComparison.Ordinal)) return target;
        string name = target[(target.LastIndexOf('/') + 1)..].Split('[')[0];
        return name.StartsWith("memfd:rollout-", StringComparison.Ordinal) ? "memfd:rollout" : name;
    }

    /// <summary>Files of Rollout in shared memory, of any process.</summary>
    public static string[] SharedMemory(string pattern) => Directory.GetFiles("/dev/shm", pattern);

    private static string? Read(Func<string?> read)
    {
        try
        {
            return read();
        }
        catch (IOException)
        {
            return null; // it has just ended
        }
    }
}
