using System.Diagnostics;
using System.Text.RegularExpressions;
using System.Xml.Linq;
using Xunit;

namespace Rollout.House.Tests;

/// <summary>
/// The rules of the repository that tests enforce: which project may reference which, where unsafe code may be, and how long lines, files
/// and names of tests may be.
/// </summary>
public sealed partial class HouseTests
{
    private static readonly string s_root = FindRoot();

    /// <summary>
    /// Project folder to the project folders it may reference. Tests, perf and examples are not restricted.
    /// </summary>
    private static readonly Dictionary<string, string[]> s_arrows = new()
    {
        ["protos"] = [],
        ["native"] = [],
        ["kernels"] = ["native"],
        ["engine"] = ["kernels"],
        ["sidecar/server"] = ["engine", "kernels", "protos"],
        ["sidecar/client"] = ["protos", "native"],
        ["sidecar/client.torch"] = ["sidecar/client"],
    };

    /// <summary>Packages a project must not reference, by prefix.</summary>
    private static readonly Dictionary<string, string[]> s_foreign = new()
    {
        ["engine"] = ["Grpc", "Google.Protobuf", "Microsoft.AspNetCore", "OpenTelemetry", "TorchSharp"],
        ["sidecar/client"] = ["Microsoft.AspNetCore", "Grpc.AspNetCore", "TorchSharp"],
        ["sidecar/server"] = ["TorchSharp"],
    };

    public static TheoryData<string> Projects => [.. s_arrows.Keys];

    [Theory, MemberData(nameof(Projects))]
    public void Arrows_do_not_turn(string project)
    {
        string[] references = [.. Items(project, "ProjectReference").Select(reference =>
            Path.GetRelativePath(s_root, Path.GetDirectoryName(Path.GetFullPath(reference, Path.Combine(s_root, project)))!))];
        Assert.Empty(references.Except(s_arrows[project]));
    }

    [Theory, MemberData(nameof(Projects))]
    public void No_project_knows_a_package_of_another_floor(string project)
    {
        string[] foreign = s_foreign.GetValueOrDefault(project, []);
        Assert.DoesNotContain(Items(project, "PackageReference"), package => foreign.Any(package.StartsWith));
        string sdk = XDocument.Load(ProjectFile(project)).Root!.Attribute("Sdk")!.Value;
        Assert.Equal(project == "sidecar/server" ? "Microsoft.NET.Sdk.Web" : "Microsoft.NET.Sdk", sdk);
    }

    /// <summary>
    /// The arithmetic is our own. The assembler encodes the instructions that .NET has no intrinsics for. The digest of a tensor is one
    /// definition for host and device, and its hash is .NET's. The bindings need no package.
    /// </summary>
    [Fact]
    public void Kernels_know_two_packages_and_native_none()
    {
        Assert.Equal(["Iced", "System.IO.Hashing"], Items("kernels", "PackageReference"));
        Assert.Empty(Items("native", "PackageReference"));
    }

    [Fact]
    public async Task A_relative_path_after_dotnet_run_is_the_users()
    {
        string configuration = AppContext.BaseDirectory.Contains("Release", StringComparison.Ordinal) ? "Release" : "Debug";
        string server = Path.Combine(s_root, "sidecar", "server");
        using Process run = Process.Start(new ProcessStartInfo("dotnet",
            ["run", "-c", configuration, "--no-build", "--project", server, "--", "inspect", "--model", "golden/qwen3"])
        {
            WorkingDirectory = Path.Combine(s_root, "tests"),
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        Task<string> errors = run.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        string output = await run.StandardOutput.ReadToEndAsync(TestContext.Current.CancellationToken);
        await run.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.True(run.ExitCode == 0, $"{output}{await errors}");
        Assert.Contains("qwen3", output, StringComparison.Ordinal);
    }

    [Fact]
    public void Examples_use_the_client_and_start_the_program_as_a_user_would()
    {
        foreach (string file in Directory.EnumerateFiles(Path.Combine(s_root, "examples"), "*.csproj", SearchOption.AllDirectories))
        {
            foreach (XElement reference in XDocument.Load(file).Descendants("ProjectReference"))
            {
                string include = reference.Attribute("Include")!.Value;
                bool builtOnly = reference.Attribute("ReferenceOutputAssembly")?.Value == "false";
                Assert.True(include.Contains("/sidecar/client", StringComparison.Ordinal) || builtOnly, $"{file} references {include}");
            }
        }
    }

    [Fact]
    public void Unsafe_code_and_native_calls_live_in_kernels_and_native()
    {
        string[] offenders = [.. Sources().Where(file => file.Split('/')[0] is not ("kernels" or "native" or "tests"))
            .Where(file => UnsafeOrNative().IsMatch(File.ReadAllText(Path.Combine(s_root, file))))];
        Assert.Empty(offenders);
        foreach (string project in s_arrows.Keys.Where(project => project is not ("kernels" or "native")))
            Assert.DoesNotContain("AllowUnsafeBlocks", File.ReadAllText(ProjectFile(project)), StringComparison.Ordinal);
    }

    /// <summary>A second surface beside gRPC must be able to use these folders without any gRPC type.</summary>
    [Theory]
    [InlineData("sidecar/server/Generation")]
    [InlineData("sidecar/server/Control")]
    public void What_all_surfaces_share_knows_none_of_them(string folder)
    {
        string[] files = Directory.GetFiles(Path.Combine(s_root, folder), "*.cs");
        Assert.NotEmpty(files);
        Assert.DoesNotContain(files, file => SurfaceType().IsMatch(File.ReadAllText(file)));
    }

    /// <summary>Its documentation says exp(x) / sum exp(x): the maximum is not subtracted, so it overflows on ordinary logits.</summary>
    [Fact]
    public void TensorPrimitives_SoftMax_is_not_used()
        => Assert.DoesNotContain(Sources().Where(file => file != "tests/house/HouseTests.cs"),
            file => File.ReadAllText(Path.Combine(s_root, file)).Contains("TensorPrimitives.SoftMax", StringComparison.Ordinal));

    [Fact]
    public void Lines_have_at_most_140_columns()
    {
        const int MostColumns = 140;
        Assert.True(AllLines().Count() > 10_000);
        NoneOf(AllLines().Where(line => line.Text.Length > MostColumns)
            .Select(line => $"{line.Place}: {line.Text.Length} columns, at most {MostColumns}"));
    }

    [Fact]
    public void Files_have_at_most_500_lines()
    {
        const int MostLines = 500;
        NoneOf(Sources().Select(file => (File: file, Lines: File.ReadLines(Path.Combine(s_root, file)).Count()))
            .Where(file => file.Lines > MostLines)
            .Select(file => $"{file.File}:{file.Lines}: {file.Lines} lines, at most {MostLines}"));
    }

    [Fact]
    public void Names_of_tests_are_below_80_characters()
    {
        const int MostCharacters = 79;
        NoneOf(AllLines().Where(line => line.Place.StartsWith("tests/", StringComparison.Ordinal))
            .Select(line => (line.Place, Name: TestMethod().Match(line.Text).Groups[1].Value))
            .Where(test => test.Name.Length > MostCharacters)
            .Select(test => $"{test.Place}: {test.Name} has {test.Name.Length} characters, at most {MostCharacters}"));
    }

    [GeneratedRegex(@"\bpublic (?:static )?(?:async )?(?:void|Task|ValueTask) (\w+)\(")]
    private static partial Regex TestMethod();

    [GeneratedRegex(@"\bunsafe\b\s*(class|struct|static|void|\{|partial|sealed)|\bstackalloc\s+\w+\*|\[(DllImport|LibraryImport)\b")]
    private static partial Regex UnsafeOrNative();

    [GeneratedRegex(@"\b(Grpc\.|Google\.Protobuf|V1\b|Microsoft\.AspNetCore)")]
    private static partial Regex SurfaceType();

    private static IEnumerable<string> Sources()
        => Directory.EnumerateFiles(s_root, "*.cs", SearchOption.AllDirectories)
            .Select(file => Path.GetRelativePath(s_root, file))
            .Where(file => !file.Split('/').Any(part => part is "bin" or "obj"));

    /// <summary>Every line of C# in the repository, with its place as file:line.</summary>
    private static IEnumerable<(string Place, string Text)> AllLines()
        => Sources().Order(StringComparer.Ordinal).SelectMany(file => File.ReadLines(Path.Combine(s_root, file))
            .Select((text, i) => ($"{file}:{i + 1}", text)));

    /// <summary>Fails with one line for each violation.</summary>
    private static void NoneOf(IEnumerable<string> violations)
    {
        string[] found = [.. violations];
        if (found.Length > 0) Assert.Fail($"{found.Length} violations:\n{string.Join('\n', found)}");
    }

    private static IEnumerable<string> Items(string project, string kind)
        => XDocument.Load(ProjectFile(project)).Descendants(kind).Select(item => item.Attribute("Include")!.Value);

    private static string ProjectFile(string project) => Assert.Single(Directory.GetFiles(Path.Combine(s_root, project), "*.csproj"));

    private static string FindRoot()
    {
        DirectoryInfo? folder = new(AppContext.BaseDirectory);
        while (folder is not null && !File.Exists(Path.Combine(folder.FullName, "Rollout.sln"))) folder = folder.Parent;
        return folder?.FullName ?? throw new InvalidOperationException("the tests run outside the repository");
    }
}
