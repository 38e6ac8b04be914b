namespace Rollout.Engine.Tests;

/// <summary>Finds tests/golden from wherever the tests run.</summary>
internal static class GoldenFiles
{
    public static string Folder { get; } = Find();

    /// <summary>Full path of a file or folder under tests/golden.</summary>
    public static string Get(params ReadOnlySpan<string> parts) => Path.Combine([Folder, .. parts]);

    private static string Find()
    {
        for (DirectoryInfo? at = new(AppContext.BaseDirectory); at is not null; at = at.Parent)
        {
            string golden = Path.Combine(at.FullName, "tests", "golden");
            if (Directory.Exists(golden))
                return golden;
        }
        throw new DirectoryNotFoundException("tests/golden is not above " + AppContext.BaseDirectory);
    }
}
