using System.CommandLine;

namespace Rollout.Examples.Grpo;

/// <summary>The options of the command line.</summary>
public sealed record Options(
    int Seed, int Steps, double Minutes, double Target, int Prompts, int Samples, int Threads, string Device, string Out)
{
    /// <summary>Parses the arguments. For help and errors, prints them and returns null and an exit code.</summary>
    public static (Options? Options, int ExitCode) Parse(string[] args)
    {
        Option<int> seed = new("--seed")
        {
            Description = "Seed of the weights, the problems and the samples",
            DefaultValueFactory = _ => 1,
        };
        Option<int> steps = new("--steps") { Description = "At most this many GRPO steps", DefaultValueFactory = _ => 600 };
        Option<double> minutes = new("--minutes")
        {
            Description = "Stop after this long, start-up included",
            DefaultValueFactory = _ => 3,
        };
        Option<double> target = new("--target")
        {
            Description = "Stop once the mean reward of ten steps has reached this",
            DefaultValueFactory = _ => 0.95,
        };
        Option<int> prompts = new("--prompts") { Description = "Problems a step", DefaultValueFactory = _ => 32 };
        Option<int> samples = new("--samples")
        {
            Description = "Samples a problem: the size of a group",
            DefaultValueFactory = _ => 16,
        };
        Option<int> threads = new("--threads")
        {
            Description = "Threads of the trainer",
            DefaultValueFactory = _ => Math.Clamp(Environment.ProcessorCount, 1, 8),
        };
        Option<string> device = new("--device")
        {
            Description = "Device of the sidecar: cpu, cuda, cuda:N or auto",
            DefaultValueFactory = _ => "cpu",
        };
        Option<string> output = new("--out")
        {
            Description = "Folder for the model and the plot",
            DefaultValueFactory = _ => "grpo-out",
        };
        foreach (Option<int> count in (Option<int>[])[steps, prompts, samples, threads])
        {
            count.Validators.Add(result =>
            {
                if (result.GetValueOrDefault<int>() < 1)
                    result.AddError($"{count.Name} must be at least 1.");
            });
        }

        RootCommand command = new("Trains a small policy to add, with GRPO, on samples from a Rollout sidecar.")
        {
            seed, steps, minutes, target, prompts, samples, threads, device, output,
        };
        Options? options = null;
        command.SetAction(parsed => options = new(
            parsed.GetValue(seed), parsed.GetValue(steps), parsed.GetValue(minutes), parsed.GetValue(target), parsed.GetValue(prompts),
            parsed.GetValue(samples), parsed.GetValue(threads), parsed.GetValue(device)!, parsed.GetValue(output)!));
        int code = command.Parse(args).Invoke();
        return (options, code);
    }
}
